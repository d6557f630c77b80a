"""CUDA C++ kernels for Hopper, compiled by NVRTC when first used: no compiler is needed.

A source is `words.cuh` and `hopper.cuh`, wrappers of the wgmma widths in use, constants,
and the kernel's own file. What was compiled is kept in the user's cache, in `based`. NVRTC
comes with torch's CUDA builds; without it (or on another GPU) the Triton kernels compute the
same.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from based.ops.fallback import warn_once

OPTIONS = (b"--gpu-architecture=sm_90a", b"--std=c++17")
# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_SIZE = 8
# CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
CLUSTER, PROGRAMMATIC = 4, 6
# CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B
BFLOAT16, SWIZZLE_128B, PROMOTION_256B = 9, 3, 3
Argument = Tensor | int | float | ctypes.Array


def source_of(
    paths: Sequence[Path], constants: dict[str, int | bool | str], widths: Sequence[int]
) -> str:
    """The whole text of a kernel; constants that are text become macros."""
    lines = [
        f"#define {name} {value}"
        if isinstance(value, str)
        else f"constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {int(value)};"
        for name, value in constants.items()
    ]
    wrappers = [wgmma_wrappers(width) for width in sorted(set(widths))]
    return "\n".join([header(), *wrappers, *lines, *(path.read_text() for path in paths)])


def header() -> str:
    """What all kernels begin with."""
    names = "words.cuh", "hopper.cuh"
    return "".join(Path(__file__).with_name(name).read_text() for name in names)


def wgmma_wrappers(n: int) -> str:
    """Products of one warpgroup: a is 64 x 16, b 16 x n and described.

    add_<n>: d += a b, start_<n>: d = a b, a in registers. multiply_<n>: either, as `add` says,
    a described, neither transposed.
    """
    registers = ", ".join(f"%{i}" for i in range(n // 2))
    left = ", ".join(f"%{n // 2 + i}" for i in range(4))
    made = []
    for name, add, constraint in (("add", 1, "+f"), ("start", 0, "=f")):
        outputs = ", ".join(f'"{constraint}"(d[{i}])' for i in range(n // 2))
        made.append(
            f"template <int TRANSPOSED> __device__ __forceinline__ void {name}_{n}"
            f"(float (&d)[{n // 2}], const u32 (&a)[4], u64 b) {{\n"
            f'    asm volatile("{{ .reg .pred p; setp.ne.b32 p, {add}, 0; '
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 "
            f'{{{registers}}}, {{{left}}}, %{n // 2 + 4}, p, 1, 1, %{n // 2 + 5}; }}"\n'
            f'        : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), '
            f'"n"(TRANSPOSED));\n}}'
        )
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(n // 2))
    made.append(
        f"__device__ __forceinline__ void multiply_{n}"
        f"(float (&d)[{n // 2}], u64 a, u64 b, bool add) {{\n"
        f'    asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{n // 2 + 2}, 0; '
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 "
        f'{{{registers}}}, %{n // 2}, %{n // 2 + 1}, p, 1, 1, 0, 0; }}"\n'
        f'        : {outputs} : "l"(a), "l"(b), "r"((u32)add));\n}}'
    )
    return "\n".join(made)


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """NVRTC and the driver, if both are there."""
    major = (torch.version.cuda or "0").split(".")[0]
    try:
        return ctypes.CDLL(f"libnvrtc.so.{major}"), ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        warn_once(f"CUDA C++ kernels are left out, Triton's take their place: {error}")
        return None


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether kernels compiled for capability 9.0a run there, and can be compiled."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return _libraries() is not None


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_: ClassVar = [
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_uint * 16),
    ]


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_: ClassVar = [
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


def compile_kernel(
    name: str, source: str, shared: int, device: torch.device, cluster: int = 1
) -> Callable[..., None]:
    """`name` of `source` with `shared` bytes of dynamic shared memory, for one GPU.

    The result is called with grid size, block size and the kernel's arguments: tensors
    as pointers, Python integers as 64-bit ones, floats as 32-bit ones, tensor maps as they are.
    With `overlap` it may start before the one before it has ended. It runs on torch's
    current stream, and may be captured. Raises RuntimeError with the compiler's words.
    """
    libraries = _libraries()
    if libraries is None:
        raise RuntimeError("there is no NVRTC")
    nvrtc, driver = libraries
    version = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(*map(ctypes.byref, version))
    key = f"{[part.value for part in version]} {OPTIONS} {source}"
    image = kept(key, lambda: _compile(nvrtc, source))
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        _check(driver.cuModuleLoadData(ctypes.byref(module), image))
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        _check(driver.cuFuncSetAttribute(function, SHARED_SIZE, shared))

    def launch(grid: int, block: int, *arguments: Argument, overlap: bool = False) -> None:
        values = [as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        attributes = (_Attribute * 2)(
            _Attribute(CLUSTER, 0, (cluster, 1, 1)), _Attribute(PROGRAMMATIC, 0, (1,))
        )
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            sizes = grid, 1, 1, block, 1, 1, shared
            config = _Launch(sizes, stream, attributes, 2 if overlap else 1)
            _check(driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None))

    return launch


def tensor_map(
    x: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> ctypes.Array:
    """A bfloat16 tensor as `copy_rows` and `copy_blocks` of hopper.cuh see it.

    `sizes` of its axes, the contiguous one first, `strides` of the others in bytes, and the
    `box` of one copy, whose rows are 128 bytes.
    """
    libraries = _libraries()
    if libraries is None:
        raise RuntimeError("there is no CUDA driver")
    held, axes = (ctypes.c_uint64 * 24)(), len(sizes)
    # The driver wants 64-byte alignment.
    start = -ctypes.addressof(held) % 64
    made = (ctypes.c_uint64 * 16).from_buffer(held, start)
    numbers = (
        (ctypes.c_uint64 * axes)(*sizes),
        (ctypes.c_uint64 * (axes - 1))(*strides),
        (ctypes.c_uint32 * axes)(*box),
        (ctypes.c_uint32 * axes)(*[1] * axes),
    )
    at = ctypes.byref(made), BFLOAT16, axes, ctypes.c_void_p(x.data_ptr())
    _check(libraries[1].cuTensorMapEncodeTiled(*at, *numbers, 0, SWIZZLE_128B, PROMOTION_256B, 0))
    return made


def kept(key: str, make: Callable[[], bytes]) -> bytes:
    """What `make` makes for this key, from the user's cache if it has been made before."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "based"
    except RuntimeError:  # without a home
        return make()
    path = folder / f"{sha256(key.encode()).hexdigest()}.cubin"
    with suppress(OSError):
        return path.read_bytes()
    made = make()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        # Whole or not there, whoever reads meanwhile.
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(made)
        part.replace(path)
    return made


def _compile(nvrtc: ctypes.CDLL, source: str) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC: {log.value.decode(errors='replace')}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, image)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


def as_c(argument: Argument) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float | ctypes.Array:
    """A kernel's argument: a pointer, a 64-bit integer, a 32-bit float or a tensor map."""
    if isinstance(argument, ctypes.Array):
        return argument
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver refused a kernel (error {status})")
