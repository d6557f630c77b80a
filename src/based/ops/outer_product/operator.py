"""Which implementation a call takes, and the kernels' gradients: each is products of the same two.

Matrices are returned heads first and tokens last in memory: what multiplies a head's
tokens by a matrix of their own (`diagonal_state_space`) then takes them as they are.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from based.ops import kernels
from based.ops.lanes import lanes_together
from based.ops.outer_product.reference import (
    outer_product_reference,
    vector_matrix_product_reference,
)

BLOCK_T, BLOCK_C = 32, 64
# Heads of which the kernels hold every pair of channels.
LARGEST_HEAD = 4


def outer_product(
    a: Float[Tensor, "B T C"], b: Float[Tensor, "B T C"], heads: int
) -> Float[Tensor, "B T H D D"]:
    """As `reference.py` defines it; a and b of one dtype."""
    if kernels.use_kernels(a) and a.shape[-1] <= heads * LARGEST_HEAD:
        return _outer_product_of_lanes(a, b, heads)
    return outer_product_reference(a, b, heads)


def vector_matrix_product(
    a: Float[Tensor, "B T C"], m: Float[Tensor, "B T H D D"]
) -> Float[Tensor, "B T C"]:
    """As `reference.py` defines it; a and m of one dtype."""
    if kernels.use_kernels(a) and m.shape[-1] <= LARGEST_HEAD:
        return _vector_matrix_product_of_lanes(a, m)
    return vector_matrix_product_reference(a, m)


@lanes_together
def _outer_product_of_lanes(
    a: Float[Tensor, "M B T C"], b: Float[Tensor, "M B T C"], heads: int
) -> Float[Tensor, "M B T H D D"]:
    return _OuterProduct.apply(a, b, heads)


@lanes_together
def _vector_matrix_product_of_lanes(
    a: Float[Tensor, "M B T C"], m: Float[Tensor, "M B T H D D"]
) -> Float[Tensor, "M B T C"]:
    return _VectorMatrixProduct.apply(a, m)


class _OuterProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, heads: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(a, b)
        return _by_token(_outer(a, b, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        return _product(b, dm.mT, a), _product(a, dm, b), None


class _VectorMatrixProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, m: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(a, m)
        return _product(a, m, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, m = ctx.saved_tensors
        return _product(dy, m.mT, a), _by_token(_outer(a, dy, m.shape[3]))


def _by_token(m: Float[Tensor, "M H B D D T"]) -> Float[Tensor, "M B T H D D"]:
    return m.permute(0, 2, 5, 1, 3, 4)


# Operators, so that `torch.compile` takes the launches as they are.
@torch.library.custom_op("based::outer_product", mutates_args=())
def _outer(a: Tensor, b: Tensor, heads: int) -> Tensor:
    from based.ops.outer_product import triton

    m = _outer_fake(a, b, heads)
    strides = _strides("a", a) | _strides("b", b) | _strides("m", _by_token(m), "lbthij")
    triton.outer_product[_grid(a)](a, b, m, **strides, **_sizes(a, heads))
    return m


@_outer.register_fake
def _outer_fake(a: Tensor, b: Tensor, heads: int) -> Tensor:
    lanes, rows, tokens, channels = a.shape
    size = channels // heads
    return a.new_empty(lanes, heads, rows, size, size, tokens)


@torch.library.custom_op("based::vector_matrix_product", mutates_args=())
def _product(a: Tensor, m: Tensor, like: Tensor) -> Tensor:
    """In the layout of `like`."""
    from based.ops.outer_product import triton

    y, heads = _product_fake(a, m, like), m.shape[3]
    strides = _strides("a", a) | _strides("m", m, "lbthij") | _strides("y", y)
    triton.vector_matrix_product[_grid(a)](a, m, y, **strides, **_sizes(a, heads))
    return y


@_product.register_fake
def _product_fake(a: Tensor, m: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like)


def _strides(name: str, x: Tensor, axes: str = "lbtc") -> dict[str, Any]:
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=True)}


def _grid(a: Tensor) -> tuple[int, int, int]:
    lanes, rows, tokens, channels = a.shape
    return lanes * rows, -(-tokens // BLOCK_T), -(-channels // BLOCK_C)


def _sizes(a: Tensor, heads: int) -> dict[str, Any]:
    _, rows, tokens, channels = a.shape
    blocks = {"BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "num_warps": 4}
    return {"B": rows, "T": tokens, "C": channels, "D": channels // heads, **blocks}
