"""y = x W^T for a few rows: weights stream once, everything around them rides along.

A program holds a few rows of W whole, in registers. It asks for them before it waits
for the kernel before it, so that the stream of weights never stops between kernels.
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.few_rows_linear.weights import rows_of
from based.ops.kernels import overlap
from based.ops.overlap import let_next_start, only_wait
from based.ops.tensor_core import INTERPRETED

# Rows of W that a program holds, all in flight at once, and its warps; and how many numbers at
# most, for a single row of x and for several.
HELD, WARPS, MOST, MOST_OF_SEVERAL = 8, 4, 32768, 16384
# Bytes of a W that is in registers before the kernel before has ended.
SMALL = 5 << 20


@triton.jit
@no_type_check
def weight_of(
    first, second, third, output, C, N: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr
):
    """Where output `output` would count from, had its weight the outputs of all before it."""
    weight = first
    # Outputs from SECOND on, and from THIRD on, have weights of their own.
    if SECOND < N and output >= SECOND:
        weight = second - SECOND * C
    if THIRD < N and output >= THIRD:
        weight = third - THIRD * C
    return weight


def side_by_side(
    weights: Sequence[Tensor], outputs: int
) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    """Three weights (the first again where there are fewer), and where the last two begin."""
    a, b, c = [*weights, weights[0], weights[0]][:3]
    second = min(a.shape[0], outputs)
    third = min(second + b.shape[0], outputs)
    return (a, b, c), second, third


@triton.jit
@no_type_check
def _widened(w):
    """w in float32. int8 by way of 2^23 + 128 + w: the instruction for it is eight times slower."""
    if INTERPRETED or w.dtype != tl.int8:
        return w.to(tl.float32)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 biased;
        xor.b32 biased, $4, 0x80808080;
        prmt.b32 $0, biased, 0x4B000000, 0x7440;
        prmt.b32 $1, biased, 0x4B000000, 0x7441;
        prmt.b32 $2, biased, 0x4B000000, 0x7442;
        prmt.b32 $3, biased, 0x4B000000, 0x7443;
        sub.f32 $0, $0, 0f4B000080;
        sub.f32 $1, $1, 0f4B000080;
        sub.f32 $2, $2, 0f4B000080;
        sub.f32 $3, $3, 0f4B000080;
        }""",
        "=f,=f,=f,=f,r",
        [w],
        tl.float32,
        True,
        4,
    )


@triton.jit
@no_type_check
def _products(w, x, row, ROWS: tl.constexpr):
    """w x^T as [outputs, rows], row after row: w stays in its registers."""
    y = tl.zeros((w.shape[0], x.shape[0]), tl.float32)
    for r in tl.static_range(ROWS):
        one = tl.sum(tl.where(row[:, None] == r, x, 0.0), axis=0)
        product = tl.sum(_widened(w) * one[None, :], axis=1)
        y = tl.where(row[None, :] == r, product[:, None], y)
    return y


@triton.jit
@no_type_check
def _linear_kernel(
    x_ptr,
    branch_ptr,
    norm_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    first_scale_ptr,
    second_scale_ptr,
    third_scale_ptr,
    bias_ptr,
    taps_ptr,
    past_ptr,
    counter_ptr,
    sum_ptr,
    out_ptr,
    eps,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    program = tl.program_id(0)
    n, lane = program * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    if SCALED:
        # A thread reads eight channels of everything: 16 of w would have to change threads.
        lane = tl.max_contiguous(lane, 8)
    row, slot = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_W)
    real, inside, given = n < N, lane < C, row < ROWS
    weight = weight_of(first_ptr, second_ptr, third_ptr, program * BLOCK_N, C, N, SECOND, THIRD)
    cell = n.to(tl.int64)[:, None] * C + lane[None, :]
    present = real[:, None] & inside[None, :]
    w = tl.load(weight + cell, mask=present, other=0.0, eviction_policy="evict_first")
    if GATED:
        gates = weight + N * C + cell
        w_gate = tl.load(gates, mask=present, other=0.0, eviction_policy="evict_first")
    if NORM:
        norm = tl.load(norm_ptr + lane, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        scales = (first_scale_ptr, second_scale_ptr, third_scale_ptr)
        scale_ptr = weight_of(*scales, program * BLOCK_N, 1, N, SECOND, THIRD)
        scale = tl.load(scale_ptr + n, mask=real, other=0.0)
        if GATED:
            gate_scale = tl.load(scale_ptr + N + n, mask=real, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=real, other=0.0).to(tl.float32)
        if GATED:
            gate_bias = tl.load(bias_ptr + N + n, mask=real, other=0.0).to(tl.float32)
    if WIDTH > 0:
        tap = real[:, None] & (slot < WIDTH)[None, :]
        taps = tl.load(taps_ptr + n[:, None] * WIDTH + slot[None, :], mask=tap, other=0.0)
    if EARLY:
        # Again without effect, but the compiler unpacks w before the wait then, not after it.
        let_next_start(OVERLAP)
    only_wait(OVERLAP)
    where = row[:, None] * C + lane[None, :]
    held = given[:, None] & inside[None, :]
    x = tl.load(x_ptr + where, mask=held, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(branch_ptr + where, mask=held, other=0.0).to(tl.float32)
        if program == 0:
            tl.store(sum_ptr + where, x, mask=held)
    if WIDTH > 0:
        # [outputs, rows, taps]: the past inputs, which the new one joins below.
        past = past_ptr + (row[None, :, None] * (WIDTH - 1) + slot[None, None, :]) * N
        past += n[:, None, None]
        kept = real[:, None, None] & given[None, :, None]
        window = tl.load(past, mask=kept & (slot < WIDTH - 1)[None, None, :], other=0.0)
    if NORM:
        x *= (tl.rsqrt(tl.sum(x * x, axis=1) / C + eps))[:, None] * norm[None, :]
    y = _products(w, x, row, ROWS)
    if SCALED:
        y *= scale[:, None]
    if BIAS:
        y += bias[:, None]
    if GATED:
        gate = _products(w_gate, x, row, ROWS)
        if SCALED:
            gate *= gate_scale[:, None]
        if BIAS:
            gate += gate_bias[:, None]
        if WIDTH > 0:
            newest = slot[None, None, :] == WIDTH - 1
            window = tl.where(newest, y.to(past_ptr.dtype.element_ty)[:, :, None], window)
            # A slot's new value may be another thread's than its old one.
            tl.debug_barrier()
            moved = kept & ((slot > 0) & (slot < WIDTH))[None, None, :]
            tl.store(past - N, window, mask=moved)
            y = tl.sum(window.to(tl.float32) * taps.to(tl.float32)[:, None, :], axis=2)
            y *= tl.sigmoid(y) * gate
        else:
            y *= gate * tl.sigmoid(gate)
    tl.store(out_ptr + row[None, :] * N + n[:, None], y, mask=real[:, None] & given[None, :])
    if COUNT and program == 0:
        tl.store(counter_ptr + row, tl.load(counter_ptr + row, mask=given) + 1, mask=given)


def linear_kernel(
    x: Float[Tensor, "B C"],
    branch: Float[Tensor, "B C"] | None = None,
    norm: Float[Tensor, " C"] | None = None,
    eps: float = 0.0,
    *,
    weights: Sequence[Float[Tensor, "_ C"]],
    bias: Float[Tensor, " _"] | None = None,
    swiglu: bool = False,
    taps: Float[Tensor, "N W"] | None = None,
    past: Float[Tensor, "B P N"] | None = None,
    counter: Int[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"]]:
    """x + branch, and the projections of that (normalised, if `norm` is given) in W's dtype.

    All tensors are contiguous; weights are such as `rows_of` takes, all of one kind. With
    `swiglu`, or `taps` and `past`, the outputs are the first half of W's, gated by the second.
    """
    (rows, C), gated = x.shape, swiglu or taps is not None
    N = sum(weight.shape[0] for weight in weights) // (2 if gated else 1)
    rows_of_w = [found for weight in weights if (found := rows_of(weight)) is not None]
    three, second, third = side_by_side([part.values for part in rows_of_w], N)
    scales = [part.scale for part in rows_of_w if part.scale is not None]
    total = x if branch is None else torch.empty_like(x)
    out = torch.empty((rows, N), dtype=weights[0].dtype, device=x.device)
    block_c, width = triton.next_power_of_2(C), 0 if taps is None else taps.shape[1]
    # Eight-bit numbers become float32 in registers, of which as many as of bfloat16 fit.
    most = (MOST if rows == 1 else MOST_OF_SEVERAL) // (max(2, three[0].element_size()) // 2)
    block_n = max(1, min(HELD, most // block_c) // (2 if gated else 1))
    while second % block_n or third % block_n:
        block_n //= 2
    _linear_kernel[(triton.cdiv(N, block_n),)](
        x,
        x if branch is None else branch,
        x if norm is None else norm,
        *three,
        *(side_by_side(scales, N)[0] if scales else three),
        out if bias is None else bias,
        out if taps is None else taps,
        out if past is None else past,
        out if counter is None else counter,
        total,
        out,
        eps,
        ROWS=rows,
        C=C,
        N=N,
        SECOND=second,
        THIRD=third,
        ADD=branch is not None,
        NORM=norm is not None,
        SCALED=bool(scales),
        BIAS=bias is not None,
        GATED=gated,
        WIDTH=width,
        COUNT=counter is not None,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_R=triton.next_power_of_2(rows),
        BLOCK_W=triton.next_power_of_2(max(1, width)),
        EARLY=not gated and three[0].nbytes <= SMALL,
        **overlap(x),
        num_warps=WARPS,
    )
    return total, out
