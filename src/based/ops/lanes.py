"""Lanes: models of one shape that run as one, under `torch.func.vmap`.

An op on rows that holds no parameters needs no batching rule of its own: the
rows of all lanes are one larger batch.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_lanes() -> bool:
    """Whether tensors may be those of several lanes: what torch asks before it looks for rules."""
    return torch._C._are_functorch_transforms_active()


def lanes_as_rows(op: Callable[P, R]) -> Callable[P, R]:
    """Under vmap, calls `op` once with the lanes of every tensor folded into its first axis.

    For ops whose tensors all have rows first and whose rows do not meet.
    """

    @wraps(op)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not in_lanes():
            return op(*args, **kwargs)
        return _Fold.apply(lambda *rows: op(*rows, **kwargs), *args)

    return wrapped


def lanes_together(op: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Gives every tensor of `op` a first axis of lanes, of one lane outside vmap.

    For ops whose layout in memory depends on the lanes.
    """

    @wraps(op)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if in_lanes():
            return _Together.apply(lambda *lanes: op(*lanes, **kwargs), *args)
        one = (x[None] if isinstance(x, Tensor) else x for x in args)
        return op(*one, **kwargs)[0]  # pyright: ignore[reportCallIssue]

    return wrapped


def lanes_first(x: Tensor, dim: int | None, lanes: int) -> Tensor:
    """x of every lane, in a vmap rule that finds its lanes on axis `dim` (None: shared by all)."""
    return x.expand(lanes, *x.shape) if dim is None else x.movedim(dim, 0)


class _Fold(torch.autograd.Function):
    """Exists for its vmap rule: below it autograd records `op` as it would without lanes."""

    @staticmethod
    def forward(op: Callable[..., Any], *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to keep."""

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[Any, ...], op: Callable[..., Any], *args: Any
    ) -> Any:
        lanes = info.batch_size

        def fold(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return lanes_first(x, dim, lanes).flatten(0, 1)

        out = op(*(fold(x, dim) for x, dim in zip(args, in_dims[1:], strict=True)))
        if isinstance(out, Tensor):
            return out.unflatten(0, (lanes, -1)), 0
        return tuple(x.unflatten(0, (lanes, -1)) for x in out), (0,) * len(out)


class _Together(_Fold):
    """As `_Fold`, with the lanes on an axis of their own."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Callable[..., Any], *args: Any) -> Any:
        lanes = info.batch_size
        pairs = zip(args, in_dims[1:], strict=True)
        return op(*(lanes_first(x, d, lanes) if isinstance(x, Tensor) else x for x, d in pairs)), 0
