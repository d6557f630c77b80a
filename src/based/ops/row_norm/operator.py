"""Norms that stay one kernel in lanes, where each lane has weights of its own.

vmap takes PyTorch's norms apart into products and sums, a pass over memory each.
Outside lanes PyTorch's own are as good.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from based.ops import kernels
from based.ops.lanes import in_lanes, lanes_as_rows

# Tokens that a program walks: each stretch leaves a part of the weights' gradients.
STRETCH = 256
# Elements that a program holds at once.
TILE = 2048


def layer_norm(
    x: Float[Tensor, "B *T C"],
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    eps: float = 1e-5,
    residual: bool = False,
) -> Float[Tensor, "B *T C"]:
    """`F.layer_norm` over the last axis; with `residual` x + that."""
    if in_lanes() and kernels.use_kernels(x):
        return _whole(x, weight, bias, eps, residual)
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return x + y if residual else y


def rms_norm(
    x: Float[Tensor, "B *T C"], weight: Float[Tensor, " C"], eps: float = 1e-5
) -> Float[Tensor, "B *T C"]:
    """`F.rms_norm` over the last axis."""
    if in_lanes() and kernels.use_kernels(x):
        return _whole(x, weight, None, eps, False)
    return F.rms_norm(x, weight.shape, weight, eps)


def _whole(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: bool) -> Tensor:
    B = x.shape[0]
    own = None if bias is None else bias.expand(B, -1)
    return _rows(x.flatten(1, -2), weight.expand(B, -1), own, eps, residual).view(x.shape)


@lanes_as_rows
def _rows(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "B C"],
    bias: Float[Tensor, "B C"] | None,
    eps: float,
    residual: bool,
) -> Float[Tensor, "B T C"]:
    """LayerNorm, or RMSNorm where there is no bias; every row with weights of its own."""
    own = None if bias is None else bias.contiguous()
    return _Norm.apply(x.contiguous(), weight.contiguous(), own, eps, residual)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = bias is not None, eps, residual
        return _forward(x, weight, bias, eps, residual)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        centred, eps, residual = ctx.options
        x, weight = ctx.saved_tensors
        dx, *parts = _backward(x, weight, dy.contiguous(), centred, eps, residual)
        d_weight, d_bias = (part.sum(1).to(weight.dtype) for part in parts)
        return dx, d_weight, d_bias if centred else None, None, None


# Operators, so that `torch.compile` takes the launches as they are.
@torch.library.custom_op("based::row_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: bool) -> Tensor:
    from based.ops.row_norm import triton

    y = torch.empty_like(x)
    sizes = _sizes(x, eps, residual, centred=bias is not None)
    triton.forward[_grid(x)](x, weight, bias, y, **sizes)
    return y


@_forward.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: bool
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("based::row_norm_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, dy: Tensor, centred: bool, eps: float, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias a part from every stretch."""
    from based.ops.row_norm import triton

    gradients = _backward_fake(x, weight, dy, centred, eps, residual)
    triton.backward[_grid(x)](x, weight, dy, *gradients, **_sizes(x, eps, residual, centred))
    return gradients


@_backward.register_fake
def _backward_fake(
    x: Tensor, weight: Tensor, dy: Tensor, centred: bool, eps: float, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, C = x.shape
    parts = (x.new_empty(B, -(-T // STRETCH), C, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), *parts  # pyright: ignore[reportReturnType]


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], -(-x.shape[1] // STRETCH)


def _sizes(x: Tensor, eps: float, residual: bool, centred: bool) -> dict[str, Any]:
    T, C = x.shape[1:]
    block = 1 << (C - 1).bit_length()
    return {
        "T": T,
        "C": C,
        "eps": eps,
        "CENTRED": centred,
        "RESIDUAL": residual,
        "STRETCH": STRETCH,
        "BLOCK_T": max(1, min(16, TILE // block)),
        "BLOCK_C": block,
        "num_warps": 4,
    }
