"""Gradient kernels; products of pairs are computed anew, states come from `states.py`.

With D_t = -(d_out_t . out_t), the derivative by a_ti is (d_out_t . v_i + D_t) /
denominator_t, and a = 1 + s + s^2/2 has the derivative 1 + s.
"""

import triton
import triton.language as tl

from based.ops.taylor_linear_attention.kernels.features import (
    diagonal_places,
    diagonal_selectors,
    diagonal_weights,
    half_places,
    half_selectors,
    pair_places,
    pair_weights,
)
from based.ops.taylor_linear_attention.kernels.outputs import load_entries, load_rows
from based.ops.tensor_core import dot, dot_add


@triton.jit
def sum_deltas(
    out_ptr,
    d_out_ptr,
    delta_ptr,
    d_stride_t,
    d_stride_h,
    T,
    H,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
):
    """delta_t = -(d_out_t . out_t). Grid: blocks of tokens, heads."""
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
    product = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + row, -product, mask=token < T)


@triton.jit
def through_product(d_phi, u, w, P1, P2, d_x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the gradient of x where phi = (x P1) * (x P2) = u * w."""
    d_x = dot_add((d_phi * w).to(dtype), tl.trans(P1), d_x, PRECISION)
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
    """d_q, [T, H, K]. Grid: segments, heads."""
    TILES: tl.constexpr = (K * K // 2 + BF - 1) // BF
    segment, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(segments_ptr + segment * 6 + 1)
    end = tl.load(segments_ptr + segment * 6 + 2)
    strip = tl.load(segments_ptr + segment * 6 + 3).to(tl.int64)
    in_segment = tl.load(segments_ptr + segment * 6 + 4) > 0
    if begin < end:
        feature = tl.arange(0, KP)
        value = tl.arange(0, BV)
        q_ptr += begin.to(tl.int64) * q_stride_t + head * q_stride_h
        k_ptr += begin.to(tl.int64) * k_stride_t + head * k_stride_h
        v_ptr += begin.to(tl.int64) * v_stride_t + head * v_stride_h
        d_out_ptr += begin.to(tl.int64) * d_stride_t + head * d_stride_h
        denominator_ptr += begin.to(tl.int64) * H + head
        delta_ptr += begin.to(tl.int64) * H + head
        numerator_ptr += (segment.to(tl.int64) * H + head) * F * V
        normaliser_ptr += (segment.to(tl.int64) * H + head) * F
        strip_numerator_ptr += (strip * H + head) * F * V
        strip_normaliser_ptr += (strip * H + head) * F
        with_state = in_segment | HAS_STATE

        rows, exists = diagonal_places(0, K, BF)
        state = load_rows(
            numerator_ptr, strip_numerator_ptr, in_segment, HAS_STATE, rows, exists, value, V
        )
        state = (state * diagonal_weights(0, K, BF)[:, None]).to(DTYPE)
        P1, P2 = diagonal_selectors(0, K, KP, BF)
        P1, P2 = P1.to(DTYPE), P2.to(DTYPE)
        if TILES > 1:
            rows, exists = diagonal_places(1, K, BF)
            second = load_rows(
                numerator_ptr, strip_numerator_ptr, in_segment, HAS_STATE, rows, exists, value, V
            )
            second = (second * diagonal_weights(1, K, BF)[:, None]).to(DTYPE)
            S1, S2 = diagonal_selectors(1, K, KP, BF)
            S1, S2 = S1.to(DTYPE), S2.to(DTYPE)
        rows, exists = half_places(K, KP)
        half = load_rows(
            numerator_ptr, strip_numerator_ptr, in_segment, HAS_STATE, rows, exists, value, V
        )
        half = (half * (0.5 / K)).to(DTYPE)
        H1, H2 = half_selectors(K, KP)
        H1, H2 = H1.to(DTYPE), H2.to(DTYPE)
        linear = load_rows(
            numerator_ptr,
            strip_numerator_ptr,
            in_segment,
            HAS_STATE,
            1 + feature,
            feature < K,
            value,
            V,
        )
        linear = (linear * SCALE).to(DTYPE)
        entry, exists = pair_places(K, KP)
        pairs = load_entries(
            normaliser_ptr, strip_normaliser_ptr, in_segment, HAS_STATE, entry, exists
        )
        pairs *= pair_weights(K, KP)
        pairs += tl.trans(pairs)
        vector = load_entries(
            normaliser_ptr, strip_normaliser_ptr, in_segment, HAS_STATE, 1 + feature, feature < K
        )
        vector *= SCALE
        d_q_ptr += (begin.to(tl.int64) * H + head) * K

        for first in range(0, end - begin, BQ):
            token = first + tl.arange(0, BQ)
            real = token < end - begin
            q = tl.load(
                q_ptr + token[:, None] * q_stride_t + feature[None, :],
                mask=real[:, None] & (feature < K)[None, :],
                other=0.0,
            ).to(DTYPE)
            d_out = tl.load(
                d_out_ptr + token[:, None] * d_stride_t + value[None, :],
                mask=real[:, None] & (value < V)[None, :],
                other=0.0,
            ).to(DTYPE)
            inverse = 1 / tl.load(denominator_ptr + token * H, mask=real, other=1.0)
            delta = tl.load(delta_ptr + token * H, mask=real, other=0.0)
            # The division by the denominator comes last.
            d_q = tl.zeros([BQ, KP], tl.float32)
            if with_state:
                u, w = dot(q, P1, PRECISION), dot(q, P2, PRECISION)
                d_phi = dot(d_out, tl.trans(state), PRECISION)
                d_q = through_product(d_phi, u, w, P1, P2, d_q, DTYPE, PRECISION)
                if TILES > 1:
                    u, w = dot(q, S1, PRECISION), dot(q, S2, PRECISION)
                    d_phi = dot(d_out, tl.trans(second), PRECISION)
                    d_q = through_product(d_phi, u, w, S1, S2, d_q, DTYPE, PRECISION)
                for tile in tl.static_range(2, TILES):
                    Q1, Q2 = diagonal_selectors(tile, K, KP, BF)
                    Q1, Q2 = Q1.to(DTYPE), Q2.to(DTYPE)
                    places, present = diagonal_places(tile, K, BF)
                    other = load_rows(
                        numerator_ptr,
                        strip_numerator_ptr,
                        in_segment,
                        HAS_STATE,
                        places,
                        present,
                        value,
                        V,
                    )
                    other = (other * diagonal_weights(tile, K, BF)[:, None]).to(DTYPE)
                    u2, w2 = dot(q, Q1, PRECISION), dot(q, Q2, PRECISION)
                    d_phi2 = dot(d_out, tl.trans(other), PRECISION)
                    d_q = through_product(d_phi2, u2, w2, Q1, Q2, d_q, DTYPE, PRECISION)
                u1, w1 = dot(q, H1, PRECISION), dot(q, H2, PRECISION)
                d_half = dot(d_out, tl.trans(half), PRECISION)
                d_q = through_product(d_half, u1, w1, H1, H2, d_q, DTYPE, PRECISION)
                d_q = dot_add(d_out, tl.trans(linear), d_q, PRECISION)
                terms = dot(q.to(tl.float32), pairs, PRECISION) + vector[None, :]
                d_q += delta[:, None] * terms
            for key in range(0, first + BQ, BK):
                index = key + tl.arange(0, BK)
                k = tl.load(
                    k_ptr + index[:, None] * k_stride_t + feature[None, :],
                    mask=(index < end - begin)[:, None] & (feature < K)[None, :],
                    other=0.0,
                ).to(DTYPE)
                v = tl.load(
                    v_ptr + index[:, None] * v_stride_t + value[None, :],
                    mask=(index < end - begin)[:, None] & (value < V)[None, :],
                    other=0.0,
                ).to(DTYPE)
                s = dot(q, tl.trans(k), PRECISION)
                d_a = dot(d_out, tl.trans(v), PRECISION) + delta[:, None]
                d_s = d_a * (SCALE + s * (SCALE * SCALE))
                d_s = tl.where(index[None, :] <= token[:, None], d_s, 0.0)
                d_q = dot_add(d_s.to(DTYPE), k, d_q, PRECISION)
            tl.store(
                d_q_ptr + token[:, None] * H * K + feature[None, :],
                (d_q * inverse[:, None]).to(d_q_ptr.dtype.element_ty),
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
    """d_k, [T, H, K], and d_v, [T, H, V]. Grid: segments, heads."""
    TILES: tl.constexpr = (K * K // 2 + BF - 1) // BF
    segment, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(segments_ptr + segment * 6 + 1)
    end = tl.load(segments_ptr + segment * 6 + 2)
    strip = tl.load(segments_ptr + segment * 6 + 3).to(tl.int64)
    in_segment = tl.load(segments_ptr + segment * 6 + 5) == 0
    if begin < end:
        feature = tl.arange(0, KP)
        value = tl.arange(0, BV)
        q_ptr += begin.to(tl.int64) * q_stride_t + head * q_stride_h
        k_ptr += begin.to(tl.int64) * k_stride_t + head * k_stride_h
        v_ptr += begin.to(tl.int64) * v_stride_t + head * v_stride_h
        d_out_ptr += begin.to(tl.int64) * d_stride_t + head * d_stride_h
        denominator_ptr += begin.to(tl.int64) * H + head
        delta_ptr += begin.to(tl.int64) * H + head
        numerator_ptr += (segment.to(tl.int64) * H + head) * F * V
        normaliser_ptr += (segment.to(tl.int64) * H + head) * F
        strip_numerator_ptr += (strip * H + head) * F * V
        strip_normaliser_ptr += (strip * H + head) * F
        with_state = in_segment | HAS_STATE

        rows, exists = diagonal_places(0, K, BF)
        state = load_rows(
            numerator_ptr, strip_numerator_ptr, in_segment, HAS_STATE, rows, exists, value, V
        )
        state = state.to(DTYPE)
        P1, P2 = diagonal_selectors(0, K, KP, BF)
        P1, P2 = P1.to(DTYPE), P2.to(DTYPE)
        if TILES > 1:
            rows, exists = diagonal_places(1, K, BF)
            second = load_rows(
                numerator_ptr, strip_numerator_ptr, in_segment, HAS_STATE, rows, exists, value, V
            )
            second = second.to(DTYPE)
            S1, S2 = diagonal_selectors(1, K, KP, BF)
            S1, S2 = S1.to(DTYPE), S2.to(DTYPE)
        rows, exists = half_places(K, KP)
        half = load_rows(
            numerator_ptr, strip_numerator_ptr, in_segment, HAS_STATE, rows, exists, value, V
        )
        half = (half * 0.5).to(DTYPE)
        H1, H2 = half_selectors(K, KP)
        H1, H2 = H1.to(DTYPE), H2.to(DTYPE)
        linear = load_rows(
            numerator_ptr,
            strip_numerator_ptr,
            in_segment,
            HAS_STATE,
            1 + feature,
            feature < K,
            value,
            V,
        )
        linear = linear.to(DTYPE)
        entry, exists = pair_places(K, KP)
        pairs = load_entries(
            normaliser_ptr, strip_normaliser_ptr, in_segment, HAS_STATE, entry, exists
        )
        pairs += tl.trans(pairs)
        vector = load_entries(
            normaliser_ptr, strip_normaliser_ptr, in_segment, HAS_STATE, 1 + feature, feature < K
        )
        constant = tl.load(numerator_ptr + value, mask=(value < V) & in_segment, other=0.0).to(
            tl.float32
        )
        if HAS_STATE:
            constant += tl.load(strip_numerator_ptr + value, mask=value < V, other=0.0)
        d_k_ptr += (begin.to(tl.int64) * H + head) * K
        d_v_ptr += (begin.to(tl.int64) * H + head) * V

        for first in range(0, end - begin, BK):
            index = first + tl.arange(0, BK)
            real = index < end - begin
            k = tl.load(
                k_ptr + index[:, None] * k_stride_t + feature[None, :],
                mask=real[:, None] & (feature < K)[None, :],
                other=0.0,
            ).to(DTYPE)
            v = tl.load(
                v_ptr + index[:, None] * v_stride_t + value[None, :],
                mask=real[:, None] & (value < V)[None, :],
                other=0.0,
            ).to(DTYPE)
            d_k = tl.zeros([BK, KP], tl.float32)
            d_v = tl.zeros([BK, BV], tl.float32)
            if with_state:
                u, w = dot(k, P1, PRECISION), dot(k, P2, PRECISION)
                d_v = dot_add((u * w).to(DTYPE), state, d_v, PRECISION)
                d_phi = dot(v, tl.trans(state), PRECISION)
                d_k = through_product(d_phi, u, w, P1, P2, d_k, DTYPE, PRECISION)
                if TILES > 1:
                    u, w = dot(k, S1, PRECISION), dot(k, S2, PRECISION)
                    d_v = dot_add((u * w).to(DTYPE), second, d_v, PRECISION)
                    d_phi = dot(v, tl.trans(second), PRECISION)
                    d_k = through_product(d_phi, u, w, S1, S2, d_k, DTYPE, PRECISION)
                for tile in tl.static_range(2, TILES):
                    Q1, Q2 = diagonal_selectors(tile, K, KP, BF)
                    Q1, Q2 = Q1.to(DTYPE), Q2.to(DTYPE)
                    places, present = diagonal_places(tile, K, BF)
                    other = load_rows(
                        numerator_ptr,
                        strip_numerator_ptr,
                        in_segment,
                        HAS_STATE,
                        places,
                        present,
                        value,
                        V,
                    )
                    other = other.to(DTYPE)
                    u2, w2 = dot(k, Q1, PRECISION), dot(k, Q2, PRECISION)
                    d_v = dot_add((u2 * w2).to(DTYPE), other, d_v, PRECISION)
                    d_phi2 = dot(v, tl.trans(other), PRECISION)
                    d_k = through_product(d_phi2, u2, w2, Q1, Q2, d_k, DTYPE, PRECISION)
                u1, w1 = dot(k, H1, PRECISION), dot(k, H2, PRECISION)
                d_v = dot_add((u1 * w1).to(DTYPE), half, d_v, PRECISION)
                d_half = dot(v, tl.trans(half), PRECISION)
                d_k = through_product(d_half, u1, w1, H1, H2, d_k, DTYPE, PRECISION)
                d_v = dot_add(k, linear, d_v, PRECISION)
                d_k = dot_add(v, tl.trans(linear), d_k, PRECISION)
                d_v += constant[None, :]
                d_k += dot(k.to(tl.float32), pairs, PRECISION) + vector[None, :]
            for query in range(first, end - begin, BQ):
                token = query + tl.arange(0, BQ)
                known = token < end - begin
                q = tl.load(
                    q_ptr + token[:, None] * q_stride_t + feature[None, :],
                    mask=known[:, None] & (feature < K)[None, :],
                    other=0.0,
                ).to(DTYPE)
                d_out = tl.load(
                    d_out_ptr + token[:, None] * d_stride_t + value[None, :],
                    mask=known[:, None] & (value < V)[None, :],
                    other=0.0,
                ).to(DTYPE)
                inverse = 1 / tl.load(denominator_ptr + token * H, mask=known, other=1.0)
                delta = tl.load(delta_ptr + token * H, mask=known, other=0.0)
                s = dot(k, tl.trans(q), PRECISION)
                inverse = tl.where(index[:, None] <= token[None, :], inverse[None, :], 0.0)
                a = (1 + s * (SCALE + s * (0.5 * SCALE * SCALE))) * inverse
                d_v = dot_add(a.to(DTYPE), d_out, d_v, PRECISION)
                d_a = (dot(v, tl.trans(d_out), PRECISION) + delta[None, :]) * inverse
                d_s = d_a * (SCALE + s * (SCALE * SCALE))
                d_k = dot_add(d_s.to(DTYPE), q, d_k, PRECISION)
            tl.store(
                d_k_ptr + index[:, None] * H * K + feature[None, :],
                d_k.to(d_k_ptr.dtype.element_ty),
                mask=real[:, None] & (feature < K)[None, :],
            )
            tl.store(
                d_v_ptr + index[:, None] * H * V + value[None, :],
                d_v.to(d_v_ptr.dtype.element_ty),
                mask=real[:, None] & (value < V)[None, :],
            )
