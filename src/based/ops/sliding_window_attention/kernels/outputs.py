"""Output kernel: softmax over the few key tiles that a block of queries sees."""

import triton
import triton.language as tl

from based.ops.sliding_window_attention.kernels.bounds import (
    LENGTHS,
    first_key,
    load_rows,
    store_rows,
    within,
)
from based.ops.tensor_core import dot, dot_add

LOG2E = tl.constexpr(1.4426950408889634)
# Below any score, and finite, so that what has seen no key weighs nothing.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def add_keys(
    begin,
    end,
    sums,
    q,
    first,
    beyond,
    keys,
    channel,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The running softmax `sums` (peak, total, acc), with the keys begin .. end."""
    peak, total, acc = sums
    k_ptr, v_ptr, k_stride, v_stride, S = keys
    for start in range(begin, end, BK):
        key = start + tl.arange(0, BK)
        k = load_rows(k_ptr, start, S, BK, channel, k_stride, D)
        v = load_rows(v_ptr, start, S, BK, channel, v_stride, D)
        s = dot(q, tl.trans(k), PRECISION)
        if MASKED:
            visible = within(key[None, :], first[:, None], beyond[:, None])
            s = tl.where(visible, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * (SCALE * LOG2E))
        p = tl.exp2(s * (SCALE * LOG2E) - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = dot_add(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        peak = higher
    return peak, total, acc


@triton.jit(do_not_specialize=LENGTHS)
def window_outputs(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    edges_ptr,
    past_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    T,
    S,
    H,
    window,
    PACKED: tl.constexpr,
    PAST: tl.constexpr,
    WIDE: tl.constexpr,  # whether some tiles of keys are seen by all queries of a block
    D: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out, [B, T, H, D], and log2 of the sum of exponentials, float32 [B, H, T].

    Grid: heads, blocks of queries, rows.
    """
    head, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BD)
    P = S - T
    token = block * BQ + tl.arange(0, BQ)
    real = token < T
    begin, end = P + block * BQ, P + tl.minimum(block * BQ + BQ, T)
    # Rows beyond the last token do as it does.
    position = tl.minimum(P + token, end - 1)
    first = first_key(position, row, edges_ptr, past_ptr, P, S, window, PACKED, PAST)
    q_ptr += row * q_stride_b + head * q_stride_h
    q = load_rows(q_ptr, block * BQ, T, BQ, channel, q_stride_t, D)
    k_ptr += row * k_stride_b + head * k_stride_h
    v_ptr += row * v_stride_b + head * v_stride_h
    keys = (k_ptr, v_ptr, k_stride_t, v_stride_t, S)
    sums = (
        tl.full([BQ], LOWEST, tl.float32),
        tl.zeros([BQ], tl.float32),
        tl.zeros([BQ, BD], tl.float32),
    )
    start = first_key(begin, row, edges_ptr, past_ptr, P, S, window, PACKED, PAST)
    given = (q, first, position + 1, keys, channel)
    if WIDE:
        common = first_key(end - 1, row, edges_ptr, past_ptr, P, S, window, PACKED, PAST)
        common = start + tl.cdiv(common - start, BK) * BK
        diagonal = common + tl.maximum(begin + 1 - common, 0) // BK * BK
        sums = add_keys(start, common, sums, *given, True, D, BK, SCALE, PRECISION)
        sums = add_keys(common, diagonal, sums, *given, False, D, BK, SCALE, PRECISION)
        start = diagonal
    peak, total, acc = add_keys(start, end, sums, *given, True, D, BK, SCALE, PRECISION)
    out_ptr += (row * T * H + head) * D
    store_rows(out_ptr, block * BQ, T, channel, H * D, D, acc * (1 / total)[:, None])
    tl.store(lse_ptr + (row * H + head) * T + token, peak + tl.log2(total), mask=real)
