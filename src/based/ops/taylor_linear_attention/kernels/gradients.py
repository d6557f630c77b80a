"""Gradient kernels; products of pairs are computed anew, states come from `states.py`.

With g = d_out / denominator and delta = -(g . out), the derivative by a_ti is
g_t . v_i + delta_t, and a = 1 + s + s^2/2 has the derivative 1 + s.
"""

import triton
import triton.language as tl

from based.ops.taylor_linear_attention.kernels.features import (
    diagonal_places,
    diagonal_selectors,
    diagonal_weights,
    pair_places,
    pair_weights,
    rest_biases,
    rest_places,
    rest_selectors,
    rest_weights,
)
from based.ops.taylor_linear_attention.kernels.outputs import load_entries, load_rows
from based.ops.tensor_core import dot, dot_add


@triton.jit
def sum_deltas(
    out_ptr,
    d_out_ptr,
    denominator_ptr,
    delta_ptr,
    d_stride_t,
    d_stride_h,
    T,
    H,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
):
    """delta_t = -(d_out_t . out_t) / denominator_t. Grid: blocks of tokens, heads."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    head = tl.program_id(1)
    value = tl.arange(0, BV)
    mask = (token < T)[:, None] & (value < V)[None, :]
    row = token * H + head
    out = tl.load(out_ptr + row[:, None] * V + value[None, :], mask=mask, other=0.0)
    d_out = tl.load(
        d_out_ptr + token[:, None] * d_stride_t + head * d_stride_h + value[None, :],
        mask=mask,
        other=0.0,
    )
    below = tl.load(denominator_ptr + row, mask=token < T, other=1.0)
    product = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + row, -product / below, mask=token < T)


@triton.jit
def through_product(d_phi, u, w, P1, P2, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of x where phi = (x P1 + b1) * (x P2 + b2) = u * w."""
    d_x = dot((d_phi * w).to(dtype), tl.trans(P1), PRECISION)
    return dot_add((d_phi * u).to(dtype), tl.trans(P2), d_x, PRECISION)


@triton.jit
def query_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    denominator_ptr,
    delta_ptr,
    d_q_ptr,
    segments_ptr,
    numerator_ptr,
    normaliser_ptr,
    strip_numerator_ptr,
    strip_normaliser_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    d_stride_t,
    d_stride_h,
    H,
    HAS_STATE: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    LENGTH: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """d_q, [T, H, K]. Grid: blocks of BQ queries, heads."""
    BLOCKS: tl.constexpr = LENGTH // BQ
    TILES: tl.constexpr = (K * K // 2 + BF - 1) // BF
    segment, head = tl.program_id(0) // BLOCKS, tl.program_id(1)
    begin = tl.load(segments_ptr + segment * 6 + 1)
    end = tl.load(segments_ptr + segment * 6 + 2)
    strip = tl.load(segments_ptr + segment * 6 + 3).to(tl.int64)
    in_segment = tl.load(segments_ptr + segment * 6 + 4) > 0
    first = begin + (tl.program_id(0) % BLOCKS) * BQ
    if first < end:
        feature = tl.arange(0, KP)
        value = tl.arange(0, BV)
        token = first + tl.arange(0, BQ)
        place = token.to(tl.int64)
        real = token < end
        q = tl.load(
            q_ptr + place[:, None] * q_stride_t + head * q_stride_h + feature[None, :],
            mask=real[:, None] & (feature < K)[None, :],
            other=0.0,
        ).to(DTYPE)
        g = tl.load(
            d_out_ptr + place[:, None] * d_stride_t + head * d_stride_h + value[None, :],
            mask=real[:, None] & (value < V)[None, :],
            other=0.0,
        ).to(tl.float32)
        below = tl.load(denominator_ptr + place * H + head, mask=real, other=1.0)
        delta = tl.load(delta_ptr + place * H + head, mask=real, other=0.0)
        g = (g / below[:, None]).to(DTYPE)
        d_q = tl.zeros([BQ, KP], tl.float32)
        if in_segment | HAS_STATE:
            numerator_ptr += (segment.to(tl.int64) * H + head) * F * V
            normaliser_ptr += (segment.to(tl.int64) * H + head) * F
            strip_numerator_ptr += (strip * H + head) * F * V
            strip_normaliser_ptr += (strip * H + head) * F
            for tile in tl.static_range(TILES):
                P1, P2 = diagonal_selectors(tile, K, KP, BF)
                P1, P2 = P1.to(DTYPE), P2.to(DTYPE)
                rows, exists = diagonal_places(tile, K, BF)
                state = load_rows(
                    numerator_ptr,
                    strip_numerator_ptr,
                    in_segment,
                    HAS_STATE,
                    rows,
                    exists,
                    value,
                    V,
                )
                d_phi = dot(g, tl.trans(state.to(DTYPE)), PRECISION)
                d_phi *= diagonal_weights(tile, K, BF)[None, :]
                u = dot(q, P1, PRECISION)
                w = dot(q, P2, PRECISION)
                d_q += through_product(d_phi, u, w, P1, P2, DTYPE, PRECISION)
            R1, R2 = rest_selectors(K, KP, BR)
            R1, R2 = R1.to(DTYPE), R2.to(DTYPE)
            b1, b2 = rest_biases(K, BR)
            rows, exists = rest_places(K, BR)
            state = load_rows(
                numerator_ptr, strip_numerator_ptr, in_segment, HAS_STATE, rows, exists, value, V
            )
            d_phi = dot(g, tl.trans(state.to(DTYPE)), PRECISION)
            d_phi *= rest_weights(K, BR, SCALE)[None, :]
            u = dot(q, R1, PRECISION) + b1[None, :]
            w = dot(q, R2, PRECISION) + b2[None, :]
            d_q += through_product(d_phi, u, w, R1, R2, DTYPE, PRECISION)

            entry, exists = pair_places(K, KP)
            pairs = load_entries(
                normaliser_ptr, strip_normaliser_ptr, in_segment, HAS_STATE, entry, exists
            )
            pairs *= pair_weights(K, KP)
            linear = load_entries(
                normaliser_ptr,
                strip_normaliser_ptr,
                in_segment,
                HAS_STATE,
                1 + feature,
                feature < K,
            )
            terms = dot(q.to(tl.float32), pairs + tl.trans(pairs), PRECISION)
            d_q += delta[:, None] * (terms + SCALE * linear[None, :])
        for key in range(begin, first + BQ, BK):
            index = key + tl.arange(0, BK)
            row = index.to(tl.int64)
            k = tl.load(
                k_ptr + row[:, None] * k_stride_t + head * k_stride_h + feature[None, :],
                mask=(index < end)[:, None] & (feature < K)[None, :],
                other=0.0,
            ).to(DTYPE)
            v = tl.load(
                v_ptr + row[None, :] * v_stride_t + head * v_stride_h + value[:, None],
                mask=(index < end)[None, :] & (value < V)[:, None],
                other=0.0,
            ).to(DTYPE)
            s = dot(q, tl.trans(k), PRECISION) * SCALE
            d_a = dot(g, v, PRECISION) + delta[:, None]
            d_s = tl.where(index[None, :] <= token[:, None], d_a * (1 + s) * SCALE, 0.0)
            d_q = dot_add(d_s.to(DTYPE), k, d_q, PRECISION)
        tl.store(
            d_q_ptr + (place[:, None] * H + head) * K + feature[None, :],
            d_q.to(d_q_ptr.dtype.element_ty),
            mask=real[:, None] & (feature < K)[None, :],
        )


@triton.jit
def key_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    denominator_ptr,
    delta_ptr,
    d_k_ptr,
    d_v_ptr,
    segments_ptr,
    numerator_ptr,  # gradients of the states after each segment, by strip
    normaliser_ptr,
    strip_numerator_ptr,  # and what later strips add
    strip_normaliser_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    d_stride_t,
    d_stride_h,
    H,
    HAS_STATE: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    LENGTH: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """d_k, [T, H, K], and d_v, [T, H, V]. Grid: blocks of BK keys, heads."""
    BLOCKS: tl.constexpr = LENGTH // BK
    TILES: tl.constexpr = (K * K // 2 + BF - 1) // BF
    segment, head = tl.program_id(0) // BLOCKS, tl.program_id(1)
    begin = tl.load(segments_ptr + segment * 6 + 1)
    end = tl.load(segments_ptr + segment * 6 + 2)
    strip = tl.load(segments_ptr + segment * 6 + 3).to(tl.int64)
    in_segment = tl.load(segments_ptr + segment * 6 + 5) == 0
    first = begin + (tl.program_id(0) % BLOCKS) * BK
    if first < end:
        feature = tl.arange(0, KP)
        value = tl.arange(0, BV)
        index = first + tl.arange(0, BK)
        row = index.to(tl.int64)
        real = index < end
        k = tl.load(
            k_ptr + row[:, None] * k_stride_t + head * k_stride_h + feature[None, :],
            mask=real[:, None] & (feature < K)[None, :],
            other=0.0,
        ).to(DTYPE)
        v = tl.load(
            v_ptr + row[:, None] * v_stride_t + head * v_stride_h + value[None, :],
            mask=real[:, None] & (value < V)[None, :],
            other=0.0,
        ).to(DTYPE)
        d_k = tl.zeros([BK, KP], tl.float32)
        d_v = tl.zeros([BK, BV], tl.float32)
        if in_segment | HAS_STATE:
            numerator_ptr += (segment.to(tl.int64) * H + head) * F * V
            normaliser_ptr += (segment.to(tl.int64) * H + head) * F
            strip_numerator_ptr += (strip * H + head) * F * V
            strip_normaliser_ptr += (strip * H + head) * F
            for tile in tl.static_range(TILES):
                P1, P2 = diagonal_selectors(tile, K, KP, BF)
                P1, P2 = P1.to(DTYPE), P2.to(DTYPE)
                rows, exists = diagonal_places(tile, K, BF)
                state = load_rows(
                    numerator_ptr,
                    strip_numerator_ptr,
                    in_segment,
                    HAS_STATE,
                    rows,
                    exists,
                    value,
                    V,
                ).to(DTYPE)
                u = dot(k, P1, PRECISION)
                w = dot(k, P2, PRECISION)
                d_v = dot_add((u * w).to(DTYPE), state, d_v, PRECISION)
                d_phi = dot(v, tl.trans(state), PRECISION)
                d_k += through_product(d_phi, u, w, P1, P2, DTYPE, PRECISION)
            R1, R2 = rest_selectors(K, KP, BR)
            R1, R2 = R1.to(DTYPE), R2.to(DTYPE)
            b1, b2 = rest_biases(K, BR)
            rows, exists = rest_places(K, BR)
            state = load_rows(
                numerator_ptr, strip_numerator_ptr, in_segment, HAS_STATE, rows, exists, value, V
            ).to(DTYPE)
            u = dot(k, R1, PRECISION) + b1[None, :]
            w = dot(k, R2, PRECISION) + b2[None, :]
            d_v = dot_add((u * w).to(DTYPE), state, d_v, PRECISION)
            d_phi = dot(v, tl.trans(state), PRECISION)
            d_k += through_product(d_phi, u, w, R1, R2, DTYPE, PRECISION)

            entry, exists = pair_places(K, KP)
            pairs = load_entries(
                normaliser_ptr, strip_normaliser_ptr, in_segment, HAS_STATE, entry, exists
            )
            linear = load_entries(
                normaliser_ptr,
                strip_normaliser_ptr,
                in_segment,
                HAS_STATE,
                1 + feature,
                feature < K,
            )
            d_k += dot(k.to(tl.float32), pairs + tl.trans(pairs), PRECISION)
            d_k += linear[None, :]
        for query in range(first, end, BQ):
            token = query + tl.arange(0, BQ)
            place = token.to(tl.int64)
            known = token < end
            q = tl.load(
                q_ptr + place[:, None] * q_stride_t + head * q_stride_h + feature[None, :],
                mask=known[:, None] & (feature < K)[None, :],
                other=0.0,
            ).to(DTYPE)
            g = tl.load(
                d_out_ptr + place[:, None] * d_stride_t + head * d_stride_h + value[None, :],
                mask=known[:, None] & (value < V)[None, :],
                other=0.0,
            ).to(tl.float32)
            below = tl.load(denominator_ptr + place * H + head, mask=known, other=1.0)
            delta = tl.load(delta_ptr + place * H + head, mask=known, other=0.0)
            g = (g / below[:, None]).to(DTYPE)
            seen = index[:, None] <= token[None, :]
            s = dot(k, tl.trans(q), PRECISION) * SCALE
            a = tl.where(seen, 1 + s * (1 + 0.5 * s), 0.0)
            d_v = dot_add(a.to(DTYPE), g, d_v, PRECISION)
            d_a = dot(v, tl.trans(g), PRECISION) + delta[None, :]
            d_s = tl.where(seen, d_a * (1 + s) * SCALE, 0.0)
            d_k = dot_add(d_s.to(DTYPE), q, d_k, PRECISION)
        tl.store(
            d_k_ptr + (row[:, None] * H + head) * K + feature[None, :],
            d_k.to(d_k_ptr.dtype.element_ty),
            mask=real[:, None] & (feature < K)[None, :],
        )
        tl.store(
            d_v_ptr + (row[:, None] * H + head) * V + value[None, :],
            d_v.to(d_v_ptr.dtype.element_ty),
            mask=real[:, None] & (value < V)[None, :],
        )
