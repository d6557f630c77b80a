"""Gradient kernels; products of pairs are computed anew, states come from `states.py`.

With g_t = d_out_t / denominator_t and delta_t = -(g_t . out_t), the derivative by
a_ti is g_t . v_i + delta_t, and a = 1 + s + s^2/2 has the derivative 1 + s.
"""

import triton
import triton.language as tl

from based.ops.taylor_linear_attention.kernels.features import diagonal_selector
from based.ops.taylor_linear_attention.kernels.reading import (
    add_rest,
    load_diagonals,
    load_mixer,
    load_normaliser,
    load_numerator,
    load_rest,
    load_tile,
    mix,
    segment_of,
    state_first,
    state_of,
    through_diagonals,
    through_rest,
    times_first,
)
from based.ops.tensor_core import dot, dot_add


@triton.jit
def query_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    d_out_ptr,
    inverse_ptr,  # 1 / denominators of the outputs, [H, T]
    g_ptr,  # [T, H, V]
    delta_ptr,  # [H, T]
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
    T,
    H,
    HAS_STATE: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """d_q, [T, H, K], and g and delta for the kernels after it. Grid: segments x heads."""
    TILES: tl.constexpr = (K // 2 * KP + BF - 1) // BF
    STATE_FIRST: tl.constexpr = state_first(K)
    segment, head, begin, length, strip = segment_of(segments_ptr, H)
    inside = tl.load(segments_ptr + segment * 6 + 4) > 0
    if length > 0:
        feature = tl.arange(0, KP)
        value = tl.arange(0, BV)
        q_ptr += begin * q_stride_t + head * q_stride_h
        k_ptr += begin * k_stride_t + head * k_stride_h
        v_ptr += begin * v_stride_t + head * v_stride_h
        out_ptr += (begin * H + head) * V
        d_out_ptr += begin * d_stride_t + head * d_stride_h
        inverse_ptr += head.to(tl.int64) * T + begin
        g_ptr += (begin * H + head) * V
        delta_ptr += head.to(tl.int64) * T + begin
        d_q_ptr += (begin * H + head) * K
        state = (numerator_ptr, normaliser_ptr, strip_numerator_ptr, strip_normaliser_ptr)
        state = state_of(state, segment, strip, head, H, F, V)

        local = tl.arange(0, BQ)
        if STATE_FIRST:
            q_next = load_tile(q_ptr, local, q_stride_t, feature, local < length, K)
            d_next = load_tile(d_out_ptr, local, d_stride_t, value, local < length, V)
            o_next = load_tile(out_ptr, local, H * V, value, local < length, V)
            i_next = tl.load(inverse_ptr + local, mask=local < length, other=0.0)
        rows = load_diagonals(state, inside, HAS_STATE, 0, value, K, KP, V, BF, DTYPE)
        selector = diagonal_selector(0, K, KP, BF, True).to(DTYPE)
        if TILES > 1:
            rows1 = load_diagonals(state, inside, HAS_STATE, 1, value, K, KP, V, BF, DTYPE)
            selector1 = diagonal_selector(1, K, KP, BF, True).to(DTYPE)
        rest = load_rest(state, inside, HAS_STATE, value, K, KP, V, DTYPE)
        matrix = load_mixer(state, inside, HAS_STATE, K, KP, True, DTYPE)
        vector = load_normaliser(state, inside, HAS_STATE, 1 + feature, feature < K) * SCALE

        for first in range(0, length, BQ):
            token = first + local
            real = token < length
            if STATE_FIRST:
                k = load_tile(k_ptr, token, k_stride_t, feature, real, K).to(DTYPE)
                v = load_tile(v_ptr, token, v_stride_t, value, real, V).to(DTYPE)
            else:
                q_next = load_tile(q_ptr, token, q_stride_t, feature, real, K)
                d_next = load_tile(d_out_ptr, token, d_stride_t, value, real, V)
                o_next = load_tile(out_ptr, token, H * V, value, real, V)
                i_next = tl.load(inverse_ptr + token, mask=real, other=0.0)
            q = q_next.to(DTYPE)
            g = (d_next.to(tl.float32) * i_next[:, None]).to(DTYPE)
            # Of g as it was rounded: what v has in common cancels in g . (v - out).
            delta = -tl.sum(o_next.to(tl.float32) * g.to(tl.float32), 1)
            tl.store(delta_ptr + token, delta, mask=real)
            tl.store(
                g_ptr + token[:, None] * H * V + value[None, :],
                g,
                mask=real[:, None] & (value < V)[None, :],
            )
            d_q = tl.zeros([BQ, KP], tl.float32)
            if not STATE_FIRST:
                k = load_tile(k_ptr, token, k_stride_t, feature, real, K).to(DTYPE)
                v = load_tile(v_ptr, token, v_stride_t, value, real, V).to(DTYPE)
                d_q = query_pairs(d_q, q, g, delta, k, v, token, token, True, SCALE, PRECISION)
            if inside | HAS_STATE:
                x, rolled, terms = mix(q, matrix, KP, PRECISION)
                d_q += delta[:, None] * (terms + vector[None, :])
                d_q += through_rest(g, rolled, SCALE, rest, KP, PRECISION)
                second = dot(q, selector, PRECISION)
                d_phi = dot(g, tl.trans(rows), PRECISION)
                d_q += through_diagonals(x, second, d_phi, selector, KP, PRECISION)
                if TILES > 1:
                    second = dot(q, selector1, PRECISION)
                    d_phi = dot(g, tl.trans(rows1), PRECISION)
                    d_q += through_diagonals(x, second, d_phi, selector1, KP, PRECISION)
                for tile in range(2, TILES):
                    other = load_diagonals(
                        state, inside, HAS_STATE, tile, value, K, KP, V, BF, DTYPE
                    )
                    others = diagonal_selector(tile, K, KP, BF, True).to(DTYPE)
                    second = dot(q, others, PRECISION)
                    d_phi = dot(g, tl.trans(other), PRECISION)
                    d_q += through_diagonals(x, second, d_phi, others, KP, PRECISION)
            if STATE_FIRST:
                after = token + BQ
                q_next = load_tile(q_ptr, after, q_stride_t, feature, after < length, K)
                d_next = load_tile(d_out_ptr, after, d_stride_t, value, after < length, V)
                o_next = load_tile(out_ptr, after, H * V, value, after < length, V)
                i_next = tl.load(inverse_ptr + after, mask=after < length, other=0.0)
                d_q = query_pairs(d_q, q, g, delta, k, v, token, token, True, SCALE, PRECISION)
            for key in range(0, first, BK):
                index = key + tl.arange(0, BK)
                k_past = load_tile(k_ptr, index, k_stride_t, feature, index < length, K).to(DTYPE)
                v_past = load_tile(v_ptr, index, v_stride_t, value, index < length, V).to(DTYPE)
                d_q = query_pairs(
                    d_q, q, g, delta, k_past, v_past, token, index, False, SCALE, PRECISION
                )
            tl.store(
                d_q_ptr + token[:, None] * H * K + feature[None, :],
                d_q.to(d_q_ptr.dtype.element_ty),
                mask=real[:, None] & (feature < K)[None, :],
            )


@triton.jit
def query_pairs(d_q, q, g, delta, k, v, token, index, CAUSAL: tl.constexpr, SCALE, PRECISION):
    """d_q and what pairs of queries `token` and keys `index` add; a later key adds nothing."""
    d_a = dot(g, tl.trans(v), PRECISION) + delta[:, None]
    d_s = d_a * (SCALE + SCALE * SCALE * dot(q, tl.trans(k), PRECISION))
    if CAUSAL:
        d_s = tl.where(index[None, :] <= token[:, None], d_s, 0.0)
    return dot_add(d_s.to(k.dtype), k, d_q, PRECISION)


@triton.jit
def key_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,  # [T, H, V]
    delta_ptr,  # [H, T]
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
    T,
    H,
    HAS_STATE: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """d_k, [T, H, K], and d_v, [T, H, V]. Grid: segments x heads."""
    TILES: tl.constexpr = (K // 2 * KP + BF - 1) // BF
    STATE_FIRST: tl.constexpr = state_first(K)
    segment, head, begin, length, strip = segment_of(segments_ptr, H)
    inside = tl.load(segments_ptr + segment * 6 + 5) == 0
    if length > 0:
        feature = tl.arange(0, KP)
        value = tl.arange(0, BV)
        q_ptr += begin * q_stride_t + head * q_stride_h
        k_ptr += begin * k_stride_t + head * k_stride_h
        v_ptr += begin * v_stride_t + head * v_stride_h
        g_ptr += (begin * H + head) * V
        delta_ptr += head.to(tl.int64) * T + begin
        d_k_ptr += (begin * H + head) * K
        d_v_ptr += (begin * H + head) * V
        state = (numerator_ptr, normaliser_ptr, strip_numerator_ptr, strip_normaliser_ptr)
        state = state_of(state, segment, strip, head, H, F, V)

        local = tl.arange(0, BK)
        if STATE_FIRST:
            k_next = load_tile(k_ptr, local, k_stride_t, feature, local < length, K)
            v_next = load_tile(v_ptr, local, v_stride_t, value, local < length, V)
        rows = load_diagonals(state, inside, HAS_STATE, 0, value, K, KP, V, BF, DTYPE)
        selector = diagonal_selector(0, K, KP, BF, False).to(DTYPE)
        if TILES > 1:
            rows1 = load_diagonals(state, inside, HAS_STATE, 1, value, K, KP, V, BF, DTYPE)
            selector1 = diagonal_selector(1, K, KP, BF, False).to(DTYPE)
        rest = load_rest(state, inside, HAS_STATE, value, K, KP, V, DTYPE)
        constant = load_numerator(state, inside, HAS_STATE, value, value < V)
        matrix = load_mixer(state, inside, HAS_STATE, K, KP, False, DTYPE)
        vector = load_normaliser(state, inside, HAS_STATE, 1 + feature, feature < K)

        for first in range(0, length, BK):
            index = first + local
            real = index < length
            if not STATE_FIRST:
                k_next = load_tile(k_ptr, index, k_stride_t, feature, real, K)
                v_next = load_tile(v_ptr, index, v_stride_t, value, real, V)
            q = load_tile(q_ptr, index, q_stride_t, feature, real, K).to(DTYPE)
            g = load_tile(g_ptr, index, H * V, value, real, V)
            delta = tl.load(delta_ptr + index, mask=real, other=0.0)
            k, v = k_next.to(DTYPE), v_next.to(DTYPE)
            d_k = tl.zeros([BK, KP], tl.float32)
            d_v = tl.zeros([BK, BV], tl.float32)
            if not STATE_FIRST:
                d_k, d_v = key_pairs(
                    d_k, d_v, k, v, q, g, delta, index, index, True, SCALE, PRECISION, True
                )
            if inside | HAS_STATE:
                x, rolled, terms = mix(k, matrix, KP, PRECISION)
                d_k += terms + vector[None, :]
                d_k += through_rest(v, rolled, 1.0, rest, KP, PRECISION)
                d_v += constant[None, :]
                d_v = add_rest(x, rolled, 1.0, rest, d_v, KP, PRECISION)
                second = dot(k, selector, PRECISION)
                d_v = dot_add(times_first(x, second, KP).to(DTYPE), rows, d_v, PRECISION)
                d_phi = dot(v, tl.trans(rows), PRECISION)
                d_k += through_diagonals(x, second, d_phi, selector, KP, PRECISION)
                if TILES > 1:
                    second = dot(k, selector1, PRECISION)
                    d_v = dot_add(times_first(x, second, KP).to(DTYPE), rows1, d_v, PRECISION)
                    d_phi = dot(v, tl.trans(rows1), PRECISION)
                    d_k += through_diagonals(x, second, d_phi, selector1, KP, PRECISION)
                for tile in range(2, TILES):
                    other = load_diagonals(
                        state, inside, HAS_STATE, tile, value, K, KP, V, BF, DTYPE
                    )
                    others = diagonal_selector(tile, K, KP, BF, False).to(DTYPE)
                    second = dot(k, others, PRECISION)
                    d_v = dot_add(times_first(x, second, KP).to(DTYPE), other, d_v, PRECISION)
                    d_phi = dot(v, tl.trans(other), PRECISION)
                    d_k += through_diagonals(x, second, d_phi, others, KP, PRECISION)
            if STATE_FIRST:
                after = index + BK
                k_next = load_tile(k_ptr, after, k_stride_t, feature, after < length, K)
                v_next = load_tile(v_ptr, after, v_stride_t, value, after < length, V)
                d_k, d_v = key_pairs(
                    d_k, d_v, k, v, q, g, delta, index, index, True, SCALE, PRECISION, False
                )
            # Past the end q, g and delta are 0, and so is what they add.
            for query in range(first + BK, length, BQ):
                token = query + tl.arange(0, BQ)
                known = token < length
                q_later = load_tile(q_ptr, token, q_stride_t, feature, known, K).to(DTYPE)
                g_later = load_tile(g_ptr, token, H * V, value, known, V)
                delta_later = tl.load(delta_ptr + token, mask=known, other=0.0)
                d_k, d_v = key_pairs(
                    d_k,
                    d_v,
                    k,
                    v,
                    q_later,
                    g_later,
                    delta_later,
                    token,
                    index,
                    False,
                    SCALE,
                    PRECISION,
                    not STATE_FIRST,
                )
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


@triton.jit
def key_pairs(
    d_k,
    d_v,
    k,
    v,
    q,
    g,
    delta,
    token,
    index,
    CAUSAL: tl.constexpr,
    SCALE,
    PRECISION,
    VALUES_FIRST: tl.constexpr,  # the same sums; each order is the one that was tested on a GPU
):
    """d_k, d_v and what pairs of keys `index` and queries `token` add."""
    s = dot(k, tl.trans(q), PRECISION)
    causal = index[:, None] <= token[None, :]
    a = 1 + s * (SCALE + s * (0.5 * SCALE * SCALE))
    if CAUSAL:
        a = tl.where(causal, a, 0.0)
    if VALUES_FIRST:
        d_v = dot_add(a.to(g.dtype), g, d_v, PRECISION)
    d_s = (dot(v, tl.trans(g), PRECISION) + delta[None, :]) * (SCALE + SCALE * SCALE * s)
    if CAUSAL:
        d_s = tl.where(causal, d_s, 0.0)
    if not VALUES_FIRST:
        d_v = dot_add(a.to(g.dtype), g, d_v, PRECISION)
    return dot_add(d_s.to(q.dtype), q, d_k, PRECISION), d_v
