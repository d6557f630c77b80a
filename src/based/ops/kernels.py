"""When the Triton kernels are used."""

import os
from importlib.util import find_spec

from torch import Tensor

# torch's CUDA builds bring Triton. Told to interpret, it runs kernels on the CPU: for tests.
INSTALLED = find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def use_kernels(x: Tensor) -> bool:
    """Whether an operator on `x` runs as a Triton kernel: on a GPU, in up to float32."""
    return INSTALLED and (x.is_cuda or INTERPRETING) and x.element_size() <= 4
