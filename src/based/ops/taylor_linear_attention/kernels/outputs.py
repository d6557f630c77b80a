"""Output kernel: the state before a segment, and exact attention inside it."""

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
    state_of,
    times_first,
)
from based.ops.tensor_core import dot, dot_add


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    inverse_ptr,  # 1 / denominators of the outputs, [H, T]
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
    T,
    H,
    HAS_STATE: tl.constexpr,  # whether strips have predecessors
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    LENGTH: tl.constexpr,
    EARLY: tl.constexpr,
    BK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """out_t = (phi(q_t) S + sum_i a_ti v_i) / (phi(q_t) z + sum_i a_ti), i in t's segment.

    Grid: segments x heads, value tiles. The state stays on chip for all of the
    segment's queries.
    """
    TILES: tl.constexpr = (K // 2 * KP + BF - 1) // BF
    segment, head, begin, length, strip = segment_of(segments_ptr, H)
    inside = tl.load(segments_ptr + segment * 6 + 4) > 0
    if length > 0:
        v_tile = tl.program_id(1) % ((V + BV - 1) // BV)
        feature = tl.arange(0, KP)
        value = v_tile * BV + tl.arange(0, BV)
        q_ptr += begin * q_stride_t + head * q_stride_h
        k_ptr += begin * k_stride_t + head * k_stride_h
        v_ptr += begin * v_stride_t + head * v_stride_h
        out_ptr += (begin * H + head) * V
        inverse_ptr += head.to(tl.int64) * T + begin
        state = (numerator_ptr, normaliser_ptr, strip_numerator_ptr, strip_normaliser_ptr)
        state = state_of(state, segment, strip, head, H, F, V)

        local = tl.arange(0, BQ)
        q, k, v = load_three(
            q_ptr, k_ptr, v_ptr, q_stride_t, k_stride_t, v_stride_t, local, feature, value, length, K, V
        )
        rows = load_diagonals(state, inside, HAS_STATE, 0, value, K, KP, V, BF, DTYPE)
        selector = diagonal_selector(0, K, KP, BF, True).to(DTYPE)
        if TILES > 1:
            rows1 = load_diagonals(state, inside, HAS_STATE, 1, value, K, KP, V, BF, DTYPE)
            selector1 = diagonal_selector(1, K, KP, BF, True).to(DTYPE)
        rest = load_rest(state, inside, HAS_STATE, value, K, KP, V, DTYPE)
        constant = load_numerator(state, inside, HAS_STATE, value, value < V)
        matrix = load_mixer(state, inside, HAS_STATE, K, KP, True, DTYPE)
        vector = load_normaliser(state, inside, HAS_STATE, 1 + feature, feature < K) * SCALE
        count = load_normaliser(state, inside, HAS_STATE, 0, inside | HAS_STATE)

        for first in range(0, length, BQ):
            token = first + local
            real = token < length
            # The next tile's loads are under way while this one is computed.
            now, k_now, v_now = q.to(DTYPE), k.to(DTYPE), v.to(DTYPE)
            q, k, v = load_three(
                q_ptr, k_ptr, v_ptr, q_stride_t, k_stride_t, v_stride_t, token + BQ, feature, value, length, K, V
            )
            a = scores(now, k_now, token, token, True, SCALE, PRECISION)
            below = tl.sum(a, 1)
            acc = dot(a.to(DTYPE), v_now, PRECISION)
            if EARLY:
                k_next = load_tile(k_ptr, local, k_stride_t, feature, local < first, K)
                v_next = load_tile(v_ptr, local, v_stride_t, value, local < first, V)
            if inside | HAS_STATE:
                x, rolled, terms = mix(now, matrix, KP, PRECISION)
                below += tl.sum(x * (0.5 * terms + vector[None, :]), 1) + count
                acc += constant[None, :]
                acc = add_rest(x, rolled, SCALE, rest, acc, KP, PRECISION)
                phi = times_first(x, dot(now, selector, PRECISION), KP).to(DTYPE)
                acc = dot_add(phi, rows, acc, PRECISION)
                if TILES > 1:
                    phi = times_first(x, dot(now, selector1, PRECISION), KP).to(DTYPE)
                    acc = dot_add(phi, rows1, acc, PRECISION)
                for tile in range(2, TILES):
                    other = load_diagonals(
                        state, inside, HAS_STATE, tile, value, K, KP, V, BF, DTYPE
                    )
                    others = diagonal_selector(tile, K, KP, BF, True).to(DTYPE)
                    phi = times_first(x, dot(now, others, PRECISION), KP).to(DTYPE)
                    acc = dot_add(phi, other, acc, PRECISION)
            for key in range(0, first, BQ):
                if EARLY:
                    k_now, v_now = k_next.to(DTYPE), v_next.to(DTYPE)
                    index = key + BQ + local
                    k_next = load_tile(k_ptr, index, k_stride_t, feature, index < first, K)
                    v_next = load_tile(v_ptr, index, v_stride_t, value, index < first, V)
                else:
                    index = key + local
                    k_now = load_tile(k_ptr, index, k_stride_t, feature, index < length, K).to(DTYPE)
                    v_now = load_tile(v_ptr, index, v_stride_t, value, index < length, V).to(DTYPE)
                a = scores(now, k_now, token, token, False, SCALE, PRECISION)
                below += tl.sum(a, 1)
                acc = dot_add(a.to(DTYPE), v_now, acc, PRECISION)
            inverse = 1 / below
            tl.store(
                out_ptr + token[:, None] * H * V + value[None, :],
                (acc * inverse[:, None]).to(out_ptr.dtype.element_ty),
                mask=real[:, None] & (value < V)[None, :],
            )
            if v_tile == 0:
                tl.store(inverse_ptr + token, inverse, mask=real)


@triton.jit
def load_three(
    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, token, feature, value, length, K: tl.constexpr, V: tl.constexpr
):
    real = token < length
    return (
        load_tile(q_ptr, token, q_stride, feature, real, K),
        load_tile(k_ptr, token, k_stride, feature, real, K),
        load_tile(v_ptr, token, v_stride, value, real, V),
    )


@triton.jit
def scores(q, k, token, index, CAUSAL: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """a = 1 + s + s^2/2 of queries `token` and keys `index`; 0 where the key is later."""
    s = dot(q, tl.trans(k), PRECISION)
    a = 1 + s * (SCALE + s * (0.5 * SCALE * SCALE))
    if CAUSAL:
        a = tl.where(index[None, :] <= token[:, None], a, 0.0)
    return a
