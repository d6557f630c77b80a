"""When the Triton kernels are used, and how an operator says that none is."""

import warnings
from importlib.util import find_spec

from torch import Tensor

# torch's CUDA builds bring Triton.
INSTALLED = find_spec("triton") is not None
# Set by the kernels' tests: Triton's interpreter runs them on the CPU, very slowly.
INTERPRETING = False


def use_kernels(x: Tensor) -> bool:
    """Whether an operator on `x` runs as a Triton kernel: on a GPU, in up to float32."""
    return INSTALLED and (x.is_cuda or INTERPRETING) and x.element_size() <= 4


_SAID: set[str] = set()


def warn_once(message: str) -> None:
    """Warns of `message` the first time, under `torch.compile` too."""
    if message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, stacklevel=4)


# Tracing runs it instead of reading it. `torch.compiler.assume_constant_result` sets the
# same, but imports two seconds of torch._dynamo first.
warn_once._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
