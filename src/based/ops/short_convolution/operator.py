"""The convolution with what follows it, and which implementation a call takes."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from based.ops import kernels
from based.ops.gated_short_convolution.shifted import short_convolution
from based.ops.lanes import lanes_as_rows

# Tokens that a program walks: each stretch leaves a part of the weight's gradient.
STRETCH = 256
BLOCK_C = 64
LARGEST_WIDTH = 8


def activated_convolution(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None = None,
    gate: Float[Tensor, "B T C"] | None = None,
    past: Float[Tensor, "N W-1 C"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
    silu: bool = True,
) -> Float[Tensor, "B T C"]:
    """silu(conv(x) + bias), or without `silu` that sum; with a gate (conv(x) + bias) * gate + x.

    `past` and `cu_seqlens` are `short_convolution`'s. Kernels compute in float32, and
    take calls without either.
    """
    whole = past is None and cu_seqlens is None
    if whole and kernels.use_kernels(x) and weight.shape[1] <= LARGEST_WIDTH:
        rows = x.shape[0]
        own = None if bias is None else bias.expand(rows, -1)
        return _rows(x, weight.expand(rows, -1, -1), own, gate, silu)
    y = short_convolution(x, weight.to(x.dtype), past, cu_seqlens)
    y = y if bias is None else y + bias.to(x.dtype)
    if gate is not None:
        return y * gate + x
    return F.silu(y) if silu else y


@lanes_as_rows
def _rows(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "B C W"],
    bias: Float[Tensor, "B C"] | None,
    gate: Float[Tensor, "B T C"] | None,
    silu: bool,
) -> Float[Tensor, "B T C"]:
    """Every row with weights of its own: rows of different models are one batch."""
    return _Convolution.apply(x, weight, bias, gate, silu)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        silu: bool,
    ) -> Tensor:
        x, gate = _by_channel(x), None if gate is None else _by_channel(gate)
        ctx.save_for_backward(x, weight, bias, gate)
        ctx.silu = silu
        return _forward(x, weight, bias, gate, silu)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, gate = ctx.saved_tensors
        given = x, weight, bias, gate, dy.contiguous(), ctx.silu
        dx, d_weight, d_bias, d_gate = _backward(*given)
        return (
            dx,
            d_weight.sum(1).to(weight.dtype),
            None if bias is None else d_bias.sum(1).to(bias.dtype),
            None if gate is None else d_gate,
            None,
        )


def _by_channel(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# Operators, so that `torch.compile` takes the launches as they are.
@torch.library.custom_op("based::short_convolution", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, silu: bool
) -> Tensor:
    from based.ops.short_convolution import triton

    y = _forward_fake(x, weight, bias, gate, silu)
    triton.forward[_grid(x)](x, weight, bias, gate, y, **_sizes(x, weight, bias, gate, silu))
    return y


@_forward.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, silu: bool
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("based::short_convolution_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, dy: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and gate; of weight and bias a part from every stretch."""
    from based.ops.short_convolution import triton

    gradients = _backward_fake(x, weight, bias, gate, dy, silu)
    sizes = _sizes(x, weight, bias, gate, silu)
    triton.backward[_grid(x)](x, weight, bias, gate, dy, *gradients, **sizes)
    return gradients


@_backward.register_fake
def _backward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, dy: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, T, C), stretches = x.shape, -(-x.shape[1] // STRETCH)
    d_weight = x.new_empty(B, stretches, C, weight.shape[2], dtype=torch.float32)
    d_bias = x.new_empty(B, stretches, C, dtype=torch.float32)
    d_gate = x.new_empty(1) if gate is None else gate.new_empty(B, T, C)
    return x.new_empty(B, T, C), d_weight, d_bias, d_gate


def _grid(x: Tensor) -> tuple[int, int, int]:
    B, T, C = x.shape
    return B, -(-C // BLOCK_C), -(-T // STRETCH)


def _sizes(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, silu: bool
) -> dict[str, Any]:
    gate_strides = (0, 0) if gate is None else gate.stride()[:2]
    weight_strides = weight.stride()
    return {
        **dict(zip(("x_b", "X_T"), x.stride()[:2], strict=True)),
        **dict(zip(("gate_b", "GATE_T"), gate_strides, strict=True)),
        **dict(zip(("weight_b", "weight_c", "weight_w"), weight_strides, strict=True)),
        "bias_b": 0 if bias is None else bias.stride(0),
        "T": x.shape[1],
        "C": x.shape[2],
        "W": weight.shape[2],
        "SILU": silu and gate is None,
        "STRETCH": STRETCH,
        "BLOCK_C": BLOCK_C,
        "num_warps": 1,
    }
