"""The kernels as operators, and which implementation a call takes."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from based.ops import kernels
from based.ops.lanes import lanes_as_rows

# Tokens that a program walks: each stretch leaves a part of the weights' gradients.
STRETCH = 64
# Elements that four warps hold at once: more leave too few registers for other programs.
TILE = 1024

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gated_norm(
    y: Float[Tensor, "B *T H P"],
    u: Float[Tensor, "B *T H P"],
    z: Float[Tensor, "B *T C"],
    skip: Float[Tensor, " H"],
    weight: Float[Tensor, " C"],
    eps: float = 1e-5,
) -> Float[Tensor, "B *T C"]:
    """rms_norm((y + skip u) silu(z), weight) over all heads together, in y's dtype.

    Mamba-2's output (arXiv 2405.21060): `skip` is its D, one number a head, and C = H P.
    Kernels compute in float32, and read slices of wider projections where they are.
    """
    if kernels.use_kernels(y):
        B, C = y.shape[0], z.shape[-1]
        y_rows, u_rows, z_rows = (x.reshape(B, -1, C) for x in (y, u, z))
        own = skip.expand(B, -1), weight.expand(B, -1)
        return _rows(y_rows, u_rows, z_rows, *own, eps).view(z.shape)
    gated = (y + skip.to(u.dtype)[:, None] * u).flatten(-2) * F.silu(z)
    return F.rms_norm(gated, weight.shape, weight.to(gated.dtype), eps)


@lanes_as_rows
def _rows(
    y: Float[Tensor, "B T C"],
    u: Float[Tensor, "B T C"],
    z: Float[Tensor, "B T C"],
    skip: Float[Tensor, "B H"],
    weight: Float[Tensor, "B C"],
    eps: float,
) -> Float[Tensor, "B T C"]:
    """Every row with a skip and weights of its own: rows of different models are one batch."""
    tensors = (y, u, z, skip, weight)
    return _GatedNorm.apply(*(x if x.stride(-1) == 1 else x.contiguous() for x in tensors), eps)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, y: Tensor, u: Tensor, z: Tensor, skip: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(y, u, z, skip, weight)
        ctx.eps = eps
        return _forward(y, u, z, skip, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        *_, skip, weight = ctx.saved_tensors
        *wide, d_skip, d_weight = _backward(*ctx.saved_tensors, d_out.contiguous(), ctx.eps)
        d_skip = d_skip.sum(1).unflatten(-1, (skip.shape[1], -1)).sum(-1)
        return *wide, d_skip.to(skip.dtype), d_weight.sum(1).to(weight.dtype), None


# Operators, so that `torch.compile` takes the launches as they are.
@torch.library.custom_op("based::gated_norm", mutates_args=())
def _forward(y: Tensor, u: Tensor, z: Tensor, skip: Tensor, weight: Tensor, eps: float) -> Tensor:
    from based.ops.gated_norm import triton

    out = _forward_fake(y, u, z, skip, weight, eps)
    triton.forward[_grid(y)](y, u, z, skip, weight, out, **_sizes(y, u, z, skip, weight, eps))
    return out


@_forward.register_fake
def _forward_fake(
    y: Tensor, u: Tensor, z: Tensor, skip: Tensor, weight: Tensor, eps: float
) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("based::gated_norm_backward", mutates_args=())
def _backward(
    y: Tensor, u: Tensor, z: Tensor, skip: Tensor, weight: Tensor, d_out: Tensor, eps: float
) -> Gradients:
    """Gradients of y, u and z; of skip (a channel at a time) and weight a part from a stretch."""
    from based.ops.gated_norm import triton

    gradients = _backward_fake(y, u, z, skip, weight, d_out, eps)
    given = y, u, z, skip, weight, d_out, *gradients
    triton.backward[_grid(y)](*given, **_sizes(y, u, z, skip, weight, eps))
    return gradients


@_backward.register_fake
def _backward_fake(
    y: Tensor, u: Tensor, z: Tensor, skip: Tensor, weight: Tensor, d_out: Tensor, eps: float
) -> Gradients:
    B, T, C = y.shape
    wide = (x.new_empty(x.shape) for x in (y, u, z))
    parts = (y.new_empty(B, -(-T // STRETCH), C, dtype=torch.float32) for _ in range(2))
    return *wide, *parts  # pyright: ignore[reportReturnType]


def _grid(y: Tensor) -> tuple[int, int]:
    return y.shape[0], -(-y.shape[1] // STRETCH)


def _sizes(
    y: Tensor, u: Tensor, z: Tensor, skip: Tensor, weight: Tensor, eps: float
) -> dict[str, Any]:
    _, T, C = y.shape
    block = 1 << (C - 1).bit_length()
    return {
        **dict(zip(("y_b", "Y_T"), y.stride()[:2], strict=True)),
        **dict(zip(("u_b", "U_T"), u.stride()[:2], strict=True)),
        **dict(zip(("z_b", "Z_T"), z.stride()[:2], strict=True)),
        "skip_b": skip.stride(0),
        "weight_b": weight.stride(0),
        "T": T,
        "C": C,
        "P": C // skip.shape[1],
        "eps": eps,
        "STRETCH": STRETCH,
        "BLOCK_T": max(1, min(16, TILE // block)),
        "BLOCK_C": block,
        # Wider tokens than a tile take more threads, not more registers.
        "num_warps": max(4, min(16, 4 * block // TILE)),
    }
