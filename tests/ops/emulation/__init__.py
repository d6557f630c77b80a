"""CUDA C++ kernels for Hopper on a CPU: the same sources over another `hopper.cuh`."""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from based.ops import cuda

HERE, WORDS = Path(__file__).parent, Path(cuda.__file__).parent
COMPILER = shutil.which("g++")


def wrappers(width: int) -> str:
    """What `cuda` writes for one width of wgmma."""
    d = f"float (&d)[{width // 2}]"
    made = [
        f"template <int T> void {name}_{width}({d}, const u32 (&a)[4], u64 b) "
        f"{{ wgmma<{width}>(d, a, 0, b, T, {add}); }}"
        for name, add in (("add", "true"), ("start", "false"))
    ]
    described = f"void multiply_{width}({d}, u64 a, u64 b, bool add)"
    made.append(f"{described} {{ wgmma<{width}>(d, {{0, 0, 0, 0}}, a, b, 0, add); }}")
    return "\n".join(made)


def tensor_map(
    x: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> ctypes.Array:
    """A map as this folder's `hopper.cuh` reads it: axes that are not there have one entry."""
    held = (ctypes.c_uint64 * 24)()
    words = (ctypes.c_uint64 * 16).from_buffer(held, -ctypes.addressof(held) % 64)
    missing = 5 - len(sizes)
    whole = (*sizes, *[1] * missing), (*strides, *[0] * missing), (*box, *[1] * missing)
    numbers = x.data_ptr(), *(number for axis in whole for number in axis)
    words[: len(numbers)] = numbers
    return words


@cache
def _built(source: str, name: str, folder: Path) -> ctypes.CDLL:
    stem = hashlib.sha256((source + name).encode()).hexdigest()[:16]
    path = folder / f"{stem}.cpp"
    path.write_text(
        f'{source}\nextern "C" void launch_it(int grid, int threads, int cluster, void** values) '
        f"{{ arguments = values; launch<{name}>({name}, grid, threads, cluster); }}\n"
    )
    assert COMPILER is not None
    library = path.with_suffix(".so")
    options = ["-std=c++20", "-O2", "-w", "-shared", "-fPIC", "-I", str(WORDS), "-o", str(library)]
    command = [COMPILER, *options, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(library))


def emulate(monkeypatch: pytest.MonkeyPatch, folder: Path, late: bool) -> None:
    """From here on kernels for Hopper are compiled for this machine, and run on CPU tensors."""

    def header() -> str:
        text = (HERE / "hopper.cuh").read_text()
        return f"constexpr bool LATE = {str(late).lower()};\n{text}"

    def compiled(
        name: str, source: str, shared: int, device: torch.device, cluster: int = 1
    ) -> Callable[..., None]:
        library = _built(source, name, folder)

        def launch(grid: int, block: int, *values: cuda.Argument, overlap: bool = False) -> None:
            held = [cuda.as_c(value) for value in values]
            pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))
            library.launch_it(grid, block, cluster, pointers)

        return launch

    monkeypatch.setattr(cuda, "header", header)
    monkeypatch.setattr(cuda, "wgmma_wrappers", wrappers)
    monkeypatch.setattr(cuda, "compile_kernel", compiled)
    monkeypatch.setattr(cuda, "tensor_map", tensor_map)
    monkeypatch.setattr(cuda, "is_hopper", lambda device: True)
