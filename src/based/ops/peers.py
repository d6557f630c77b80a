"""Kernels of other libraries, where they are installed. None is ever the only path."""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from based.ops.lanes import in_lanes


@lru_cache
def installed(module: str, name: str) -> Callable[..., Any] | None:
    """`module.name`, or None where the library or the name is missing."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return None


def peer_kernel(
    module: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]
) -> Callable[..., Any] | None:
    """`module.name` if it is installed and takes tensors like x: on a GPU, of one of `dtypes`.

    No kernel of others takes the tensors of several lanes.
    """
    takes = x.is_cuda and x.dtype in dtypes and not in_lanes()
    return installed(module, name) if takes else None
