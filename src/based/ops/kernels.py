"""When the Triton kernels are used."""

import os
from functools import lru_cache
from importlib.util import find_spec

from torch import Tensor


@lru_cache
def triton_installed() -> bool:
    """Whether Triton can be imported; torch's CUDA builds bring it."""
    return find_spec("triton") is not None


@lru_cache
def interpreting() -> bool:
    """Whether Triton was told to run kernels on the CPU, step by step: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_kernels(x: Tensor) -> bool:
    """Whether an operator on `x` runs as a Triton kernel: on a GPU, in up to float32."""
    return (x.is_cuda or interpreting()) and x.element_size() <= 4 and triton_installed()
