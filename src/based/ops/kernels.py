"""When the Triton kernels are used, and how they follow each other."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# torch's CUDA builds bring Triton.
INSTALLED = find_spec("triton") is not None
# Set by the kernels' tests: Triton's interpreter runs them on the CPU, very slowly.
INTERPRETING = False
# Whether a decode kernel may start while the one before it ends, where a GPU can, and rows up to
# which that is faster: of more, library calls stand between, and who waits is in the way.
OVERLAP, MOST_ROWS_OVERLAPPED = True, 128
# Whether kernels in CUDA C++ take the place of Triton's on Hopper.
HOPPER = True
# Bytes of shared memory that no kernel takes.
ENOUGH = 1 << 20
_thread = threading.local()


def use_kernels(x: Tensor) -> bool:
    """Whether an operator on `x` runs as a Triton kernel: on a GPU, in up to float32."""
    return INSTALLED and are_wanted(x)


def are_wanted(x: Tensor) -> bool:
    """Whether a user would expect a kernel: float64 is for exactness, and runs in PyTorch."""
    return (x.is_cuda or INTERPRETING) and x.numel() > 0 and x.element_size() <= 4


def products_of(dtype: torch.dtype) -> str:
    """`input_precision` of kernels for inputs of that dtype.

    float32 is multiplied in TF32 where torch's own products of it are, otherwise in
    three TF32 products that come close to float32.
    """
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have on a GPU; on Hopper and later every kernel has enough."""
    if not torch.cuda.is_available():  # traced for a GPU that is not there
        return ENOUGH
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin if properties.major < 9 else ENOUGH


@contextmanager
def one_step() -> Iterator[None]:
    """A decode step, which begins with an ordinary launch and touches every state once.

    Within, this thread's kernels may read their state while the one before them still runs.
    """
    before, _thread.in_step = _in_step(), True
    try:
        yield
    finally:
        _thread.in_step = before


def _in_step() -> bool:
    return getattr(_thread, "in_step", False)


def overlap(x: Tensor, *, reads_state: bool = False) -> dict[str, bool]:
    """Launch options of a kernel that calls `overlap.wait_for_previous` before its first access.

    With programmatic dependent launch (compute capability 9 and up) a kernel's start
    hides behind the end of the one before it. A kernel that reads its state before it
    waits overlaps others only in a step, where none of them writes that.
    """
    able = OVERLAP and x.is_cuda and x.shape[0] <= MOST_ROWS_OVERLAPPED
    able = able and not torch.compiler.is_compiling()
    able = able and (_in_step() or not reads_state)
    if able and torch.cuda.get_device_capability(x.device)[0] >= 9:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
