"""Kernels of `elementwise.py`: residual addition with RMSNorm, and SwiGLU."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from based.ops.kernels import overlap
from based.ops.overlap import wait_for_previous

BLOCK = 1024
NORM, SWIGLU = {"num_warps": 8}, {"BLOCK_C": BLOCK, "num_warps": 4}


@triton.jit
@no_type_check
def _add_rms_norm_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    sum_ptr,
    normed_ptr,
    channels,
    stride,
    eps,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * channels
    channel = tl.arange(0, BLOCK_C)
    real = channel < channels
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + start + channel, mask=real, other=0.0)
    for part in tl.static_range(PARTS):
        added = branch_ptr + part * stride + start + channel
        x += tl.load(added, mask=real, other=0.0).to(tl.float32)
    if PARTS > 0:
        tl.store(sum_ptr + start + channel, x, mask=real)
    scale = tl.rsqrt(tl.sum(x * x) / channels + eps)
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    tl.store(normed_ptr + start + channel, x * scale * weight, mask=real)


def add_rms_norm_kernel(
    x: Float[Tensor, "B C"],
    branch: Float[Tensor, "*S B C"] | None,
    weight: Float[Tensor, " C"],
    eps: float,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """As `add_rms_norm`; all tensors contiguous, x float32."""
    rows, channels = x.shape
    total = x if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=weight.dtype)
    _add_rms_norm_kernel[(rows,)](
        x,
        x if branch is None else branch,
        weight,
        total,
        normed,
        channels,
        rows * channels,
        eps,
        PARTS=0 if branch is None else branch.numel() // x.numel(),
        BLOCK_C=triton.next_power_of_2(channels),
        **overlap(x),
        **NORM,
    )
    return total, normed


@triton.jit
@no_type_check
def _swiglu_kernel(x_ptr, out_ptr, channels, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    x = x_ptr + row * 2 * channels + channel
    wait_for_previous(OVERLAP)
    value = tl.load(x, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(x + channels, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * channels + channel, value * gate * tl.sigmoid(gate), mask=real)


def swiglu_kernel(x: Float[Tensor, "B CC"]) -> Float[Tensor, "B C"]:
    """As `swiglu`; x contiguous."""
    rows, channels = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    grid = (rows, triton.cdiv(channels, BLOCK))
    _swiglu_kernel[grid](x, out, channels, **overlap(x), **SWIGLU)
    return out
