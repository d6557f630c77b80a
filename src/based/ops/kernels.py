"""When the Triton kernels are used."""

from importlib.util import find_spec

from torch import Tensor

# torch's CUDA builds bring Triton.
INSTALLED = find_spec("triton") is not None
# Set by the kernels' tests: Triton's interpreter runs them on the CPU, very slowly.
INTERPRETING = False


def use_kernels(x: Tensor) -> bool:
    """Whether an operator on `x` runs as a Triton kernel: on a GPU, in up to float32."""
    return INSTALLED and (x.is_cuda or INTERPRETING) and x.element_size() <= 4
