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
# Whether what a step may leave to a stream of its own goes there.
ASIDE = True
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

    Within, this thread's kernels may read their state while the one before them still runs. What
    runs aside has ended when the step has.
    """
    before, _thread.step = _step(), []
    try:
        yield
    finally:
        for stream in {stream for stream, _ in _thread.step}:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        _thread.step = before


def _step() -> list | None:
    """Streams with what runs aside, and what must outlive it; None outside of a step."""
    return getattr(_thread, "step", None)


@contextmanager
def aside(lent: Tensor) -> Iterator[None]:
    """What is launched within comes after all before it, and runs beside what follows in the step.

    `lent`, a number a row, is what it reads besides a state: its memory is kept until the step
    ends. Of more rows than overlap, outside of a step, or without a GPU it takes its turn.
    """
    step, few = _step(), len(lent) <= MOST_ROWS_OVERLAPPED
    able = ASIDE and few and lent.is_cuda and not torch.compiler.is_compiling()
    if step is None or not able:
        yield
        return
    stream = _side_stream(lent.device)
    stream.wait_stream(torch.cuda.current_stream(lent.device))
    step.append((stream, lent))
    _thread.aside = True
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        _thread.aside = False


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's, since another one may be capturing."""
    streams = _thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def overlap(x: Tensor, *, reads_state: bool = False) -> dict[str, bool]:
    """Launch options of a kernel that calls `overlap.wait_for_previous` before its first access.

    With programmatic dependent launch (compute capability 9 and up) a kernel's start
    hides behind the end of the one before it. A kernel that reads its state before it
    waits overlaps others only in a step, where none of them writes that.
    """
    able = OVERLAP and x.is_cuda and x.shape[0] <= MOST_ROWS_OVERLAPPED
    able = able and not torch.compiler.is_compiling()
    able = able and (_step() is not None or not reads_state)
    # What starts beside a step's next kernel has waited for all that it needs.
    able = able and not getattr(_thread, "aside", False)
    if able and torch.cuda.get_device_capability(x.device)[0] >= 9:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
