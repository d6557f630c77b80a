"""CUDA C++ kernels for Hopper on a CPU: the same sources over another `hopper.cuh`."""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from based.ops import cuda

HERE, WORDS = Path(__file__).parent, Path(cuda.__file__).parent
COMPILER = shutil.which("g++")


def wrappers(width: int) -> str:
    """What `cuda` writes for one width of wgmma."""
    return "\n".join(
        f"template <int T> void {name}_{width}(float (&d)[{width // 2}], const u32 (&a)[4], u64 b) "
        f"{{ wgmma<{width}, T, {add}>(d, a, b); }}"
        for name, add in (("add", "true"), ("start", "false"))
    )


@cache
def _built(source: str, name: str, folder: Path) -> ctypes.CDLL:
    stem = hashlib.sha256((source + name).encode()).hexdigest()[:16]
    path = folder / f"{stem}.cpp"
    path.write_text(
        f'{source}\nextern "C" void launch_it(int grid, int threads, void** values) '
        f"{{ arguments = values; launch<{name}>({name}, grid, threads); }}\n"
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

    def compiled(name: str, source: str, shared: int, device: torch.device) -> Callable[..., None]:
        library = _built(source, name, folder)

        def launch(grid: int, block: int, *values: cuda.Argument) -> None:
            held = [cuda.as_c(value) for value in values]
            pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))
            library.launch_it(grid, block, pointers)

        return launch

    monkeypatch.setattr(cuda, "header", header)
    monkeypatch.setattr(cuda, "wgmma_wrappers", wrappers)
    monkeypatch.setattr(cuda, "compile_kernel", compiled)
    monkeypatch.setattr(cuda, "is_hopper", lambda device: True)
