"""Dtypes of accumulators, and autocast kept out of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and accumulators: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Products inside `function` keep the dtypes it gives them, under autocast too.

    Autocast would turn a float32 state's products into bfloat16 ones.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        if device == "meta":  # has no autocast
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def recording() -> Iterator[None]:
    """Autograd inside a custom operator, where torch has switched it off."""
    key = torch._C.DispatchKey.AutogradFunctionality
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)
