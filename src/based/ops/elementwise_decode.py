"""Kernels of `elementwise.py`: residual addition with RMSNorm, the embedding, and SwiGLU."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.kernels import overlap
from based.ops.overlap import let_next_start, only_wait, wait_for_previous

BLOCK = 1024
SWIGLU = {"BLOCK_C": BLOCK, "num_warps": 4}
# Channels of a warp in a norm: as many as one load of each of its threads brings.
OF_WARP, MOST_WARPS = 128, 16


@triton.jit
@no_type_check
def _add_rms_norm_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    normed_ptr,
    channels,
    stride,
    eps,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * channels
    channel = tl.arange(0, BLOCK_C)
    real = channel < channels
    let_next_start(OVERLAP)
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    only_wait(OVERLAP)
    x = tl.load(x_ptr + start + channel, mask=real, other=0.0)
    if PARTS > 0:
        # One load, so that no part waits for another.
        part = tl.arange(0, BLOCK_P)[:, None]
        cell = branch_ptr + part * stride + start + channel[None, :]
        added = tl.load(cell, mask=(part < PARTS) & real[None, :], other=0.0)
        x += tl.sum(added.to(tl.float32), axis=0)
        if BIAS:
            x += bias
        tl.store(sum_ptr + start + channel, x, mask=real)
    scale = tl.rsqrt(tl.sum(x * x) / channels + eps)
    tl.store(normed_ptr + start + channel, x * scale * weight, mask=real)


def add_rms_norm_kernel(
    x: Float[Tensor, "B C"],
    branch: Float[Tensor, "*S B C"] | None,
    weight: Float[Tensor, " C"],
    eps: float,
    bias: Float[Tensor, " C"] | None = None,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """As `add_rms_norm`; all tensors contiguous, x float32."""
    rows, channels = x.shape
    total = x if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=weight.dtype)
    parts = 0 if branch is None else branch.numel() // x.numel()
    block_c = triton.next_power_of_2(channels)
    _add_rms_norm_kernel[(rows,)](
        x,
        x if branch is None else branch,
        weight,
        weight if bias is None else bias,
        total,
        normed,
        channels,
        rows * channels,
        eps,
        PARTS=parts,
        BIAS=bias is not None and parts > 0,
        BLOCK_P=triton.next_power_of_2(max(1, parts)),
        BLOCK_C=block_c,
        **overlap(x),
        num_warps=min(MOST_WARPS, max(1, block_c // OF_WARP)),
    )
    return total, normed


@triton.jit
@no_type_check
def _embed_kernel(
    tokens_ptr,
    table_ptr,
    weight_ptr,
    x_ptr,
    scaled_ptr,
    squares_ptr,
    stride,
    vocab,
    channels,
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EARLY: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tile = tl.arange(0, BLOCK_T)
    channel = tile[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    real = channel < channels
    let_next_start(EARLY)
    token = tl.load(tokens_ptr + row * stride).to(tl.int64)
    # What is no token has no numbers, rather than those of other memory.
    known = (token >= 0) & (token < vocab)
    cell = table_ptr + tl.where(known, token, 0) * channels + channel
    x = tl.load(cell, mask=real, other=0.0).to(tl.float32)
    x = tl.where(known | ~real, x, float("nan"))
    tl.store(x_ptr + row * channels + channel, x, mask=real)
    if SCALED:
        weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + row * channels + channel, x * weight, mask=real)
        sums, inside = tl.sum(x * x, axis=1), tile * WIDTH < channels
        tl.store(squares_ptr + tile * rows + row, sums, mask=inside)


def embed_kernel(tokens: Int[Tensor, " B"], table: Float[Tensor, "V C"]) -> Float[Tensor, "B C"]:
    """As `embed`; the table contiguous. NaN for what is no token."""
    return _embedded(tokens, table, None, OF_WARP)[0]


def embed_with_squares_kernel(
    tokens: Int[Tensor, " B"], table: Float[Tensor, "V C"], weight: Float[Tensor, " C"], width: int
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"], Float[Tensor, "tiles B"]]:
    """As `embed_with_squares`; the table contiguous. NaN for what is no token."""
    return _embedded(tokens, table, weight, width)


def _embedded(
    tokens: Tensor, table: Tensor, weight: Tensor | None, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels = len(tokens), table.shape[1]
    tiles = triton.cdiv(channels, width)
    x = torch.empty((rows, channels), dtype=torch.float32, device=table.device)
    scaled = x if weight is None else torch.empty_like(x, dtype=weight.dtype)
    squares = x if weight is None else x.new_empty((tiles, rows))
    block = triton.next_power_of_2(tiles)
    warps = min(MOST_WARPS, max(1, block * width // OF_WARP))
    sizes = {"SCALED": weight is not None, "WIDTH": width, "BLOCK_T": block, "num_warps": warps}
    # The first kernel of a step is an ordinary launch; the next one may begin early.
    sizes["EARLY"] = overlap(tokens)["OVERLAP"]
    given = tokens, table, table if weight is None else weight
    numbers = tokens.stride(0), len(table), channels
    _embed_kernel[(rows,)](*given, x, scaled, squares, *numbers, **sizes)
    return x, scaled, squares


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
