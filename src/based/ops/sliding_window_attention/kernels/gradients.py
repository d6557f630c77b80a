"""Gradient kernels; weights are computed anew from the sums of exponentials.

With delta_t = d_out_t . out_t, the derivative by the score of key i is
p_ti (d_out_t . v_i - delta_t). One kernel goes over the keys of a block of queries, the
other over the queries of a block of keys, so that nothing is added from two programs.
"""

import triton
import triton.language as tl

from based.ops.sliding_window_attention.kernels.bounds import (
    LENGTHS,
    end_of_queries,
    first_key,
    load_rows,
    store_rows,
    within,
)
from based.ops.sliding_window_attention.kernels.outputs import LOG2E
from based.ops.tensor_core import dot, dot_add


@triton.jit
def through_keys(
    begin,
    end,
    d_q,
    q,
    d_out,
    lse,
    delta,
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
    """d_q / SCALE, with what comes through the keys begin .. end."""
    k_ptr, v_ptr, k_stride, v_stride, S = keys
    for start in range(begin, end, BK):
        key = start + tl.arange(0, BK)
        k = load_rows(k_ptr, start, S, BK, channel, k_stride, D)
        v = load_rows(v_ptr, start, S, BK, channel, v_stride, D)
        p = tl.exp2(dot(q, tl.trans(k), PRECISION) * (SCALE * LOG2E) - lse[:, None])
        if MASKED:
            visible = within(key[None, :], first[:, None], beyond[:, None])
            p = tl.where(visible, p, 0.0)
        d_s = p * (dot(d_out, tl.trans(v), PRECISION) - delta[:, None])
        d_q = dot_add(d_s.to(k.dtype), k, d_q, PRECISION)
    return d_q


@triton.jit(do_not_specialize=LENGTHS)
def window_query_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    d_q_ptr,
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
    d_stride_b,
    d_stride_t,
    d_stride_h,
    T,
    S,
    H,
    window,
    PACKED: tl.constexpr,
    PAST: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q, [B, T, H, D], and delta, [B, H, T]. Grid: heads, blocks of queries, rows."""
    head, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BD)
    P = S - T
    token = block * BQ + tl.arange(0, BQ)
    real = token < T
    begin, end = P + block * BQ, P + tl.minimum(block * BQ + BQ, T)
    position = tl.minimum(P + token, end - 1)
    first = first_key(position, row, edges_ptr, past_ptr, P, S, window, PACKED, PAST)
    q_ptr += row * q_stride_b + head * q_stride_h
    q = load_rows(q_ptr, block * BQ, T, BQ, channel, q_stride_t, D)
    d_out_ptr += row * d_stride_b + head * d_stride_h
    d_out = load_rows(d_out_ptr, block * BQ, T, BQ, channel, d_stride_t, D)
    own = (row * T * H + head) * D
    out = load_rows(out_ptr + own, block * BQ, T, BQ, channel, H * D, D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    place = (row * H + head) * T + token
    tl.store(delta_ptr + place, delta, mask=real)
    lse = tl.load(lse_ptr + place, mask=real, other=0.0)
    k_ptr += row * k_stride_b + head * k_stride_h
    v_ptr += row * v_stride_b + head * v_stride_h
    keys = (k_ptr, v_ptr, k_stride_t, v_stride_t, S)
    given = (q, d_out, lse, delta, first, position + 1, keys, channel)
    start = first_key(begin, row, edges_ptr, past_ptr, P, S, window, PACKED, PAST)
    d_q = tl.zeros([BQ, BD], tl.float32)
    if WIDE:
        common = first_key(end - 1, row, edges_ptr, past_ptr, P, S, window, PACKED, PAST)
        common = start + tl.cdiv(common - start, BK) * BK
        diagonal = common + tl.maximum(begin + 1 - common, 0) // BK * BK
        d_q = through_keys(start, common, d_q, *given, True, D, BK, SCALE, PRECISION)
        d_q = through_keys(common, diagonal, d_q, *given, False, D, BK, SCALE, PRECISION)
        start = diagonal
    d_q = through_keys(start, end, d_q, *given, True, D, BK, SCALE, PRECISION)
    store_rows(d_q_ptr + own, block * BQ, T, channel, H * D, D, d_q * SCALE)


@triton.jit
def through_queries(
    begin,
    end,
    grads,
    k,
    v,
    key,
    beyond,
    queries,
    channel,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k / SCALE and d_v, with what comes through the queries at positions begin .. end."""
    d_k, d_v = grads
    q_ptr, d_out_ptr, lse_ptr, delta_ptr, q_stride, d_stride, P, S = queries
    for start in range(begin, end, BQ):
        position = start + tl.arange(0, BQ)
        real = position < S
        q = load_rows(q_ptr, start - P, S - P, BQ, channel, q_stride, D)
        d_out = load_rows(d_out_ptr, start - P, S - P, BQ, channel, d_stride, D)
        lse = tl.load(lse_ptr + position - P, mask=real, other=0.0)
        delta = tl.load(delta_ptr + position - P, mask=real, other=0.0)
        p = tl.exp2(dot(k, tl.trans(q), PRECISION) * (SCALE * LOG2E) - lse[None, :])
        if MASKED:
            visible = within(position[None, :], key[:, None], beyond[:, None])
            p = tl.where(visible, p, 0.0)
        d_v = dot_add(p.to(d_out.dtype), d_out, d_v, PRECISION)
        d_s = p * (dot(v, tl.trans(d_out), PRECISION) - delta[None, :])
        d_k = dot_add(d_s.to(q.dtype), q, d_k, PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=LENGTHS)
def window_key_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    d_k_ptr,
    d_v_ptr,
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
    d_stride_b,
    d_stride_t,
    d_stride_h,
    T,
    S,
    H,
    window,
    PACKED: tl.constexpr,
    PAST: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k and d_v, [B, S, H, D]. Grid: heads, blocks of keys, rows."""
    head, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BD)
    P = S - T
    key = block * BK + tl.arange(0, BK)
    newest = tl.minimum(block * BK + BK, S) - 1
    beyond = end_of_queries(
        tl.minimum(key, newest), row, edges_ptr, past_ptr, P, S, window, PACKED, PAST
    )
    k_ptr += row * k_stride_b + head * k_stride_h
    k = load_rows(k_ptr, block * BK, S, BK, channel, k_stride_t, D)
    v_ptr += row * v_stride_b + head * v_stride_h
    v = load_rows(v_ptr, block * BK, S, BK, channel, v_stride_t, D)
    q_ptr += row * q_stride_b + head * q_stride_h
    d_out_ptr += row * d_stride_b + head * d_stride_h
    sums = (row * H + head) * T
    queries = (
        q_ptr,
        d_out_ptr,
        lse_ptr + sums,
        delta_ptr + sums,
        q_stride_t,
        d_stride_t,
        P,
        S,
    )
    given = (k, v, key, beyond, queries, channel)
    start = tl.maximum(block * BK, P)
    end = end_of_queries(newest, row, edges_ptr, past_ptr, P, S, window, PACKED, PAST)
    grads = (tl.zeros([BK, BD], tl.float32), tl.zeros([BK, BD], tl.float32))
    if WIDE:
        every = end_of_queries(block * BK, row, edges_ptr, past_ptr, P, S, window, PACKED, PAST)
        common = start + tl.cdiv(tl.maximum(newest - start, 0), BQ) * BQ
        edge = common + tl.maximum(every - common, 0) // BQ * BQ
        grads = through_queries(start, common, grads, *given, True, D, BQ, SCALE, PRECISION)
        grads = through_queries(common, edge, grads, *given, False, D, BQ, SCALE, PRECISION)
        start = edge
    d_k, d_v = through_queries(start, end, grads, *given, True, D, BQ, SCALE, PRECISION)
    own = (row * S * H + head) * D
    store_rows(d_k_ptr + own, block * BK, S, channel, H * D, D, d_k * SCALE)
    store_rows(d_v_ptr + own, block * BK, S, channel, H * D, D, d_v)
