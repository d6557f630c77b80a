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
    state_first,
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
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """out_t = (phi(q_t) S + sum_i a_ti v_i) / (phi(q_t) z + sum_i a_ti), i in t's segment.

    Grid: segments x heads, value tiles. The state stays on chip for all of the
    segment's queries.
    """
    TILES: tl.constexpr = (K // 2 * KP + BF - 1) // BF
    STATE_FIRST: tl.constexpr = state_first(K)
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
        if STATE_FIRST:
            q_next = load_tile(q_ptr, local, q_stride_t, feature, local < length, K)
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
            if not STATE_FIRST:
                q_next = load_tile(q_ptr, token, q_stride_t, feature, real, K)
            q = q_next.to(DTYPE)
            k = load_tile(k_ptr, token, k_stride_t, feature, real, K).to(DTYPE)
            v = load_tile(v_ptr, token, v_stride_t, value, real, V).to(DTYPE)
            acc = tl.zeros([BQ, BV], tl.float32)
            below = tl.zeros([BQ], tl.float32)
            if STATE_FIRST:
                after = token + BQ
                q_next = load_tile(q_ptr, after, q_stride_t, feature, after < length, K)
            else:
                acc, below = add_pairs(acc, below, q, k, v, token, token, True, SCALE, PRECISION)
            if inside | HAS_STATE:
                x, rolled, terms = mix(q, matrix, KP, PRECISION)
                below += tl.sum(x * (0.5 * terms + vector[None, :]), 1) + count
                acc += constant[None, :]
                acc = add_rest(x, rolled, SCALE, rest, acc, KP, PRECISION)
                phi = times_first(x, dot(q, selector, PRECISION), KP).to(DTYPE)
                acc = dot_add(phi, rows, acc, PRECISION)
                if TILES > 1:
                    phi = times_first(x, dot(q, selector1, PRECISION), KP).to(DTYPE)
                    acc = dot_add(phi, rows1, acc, PRECISION)
                for tile in range(2, TILES):
                    other = load_diagonals(
                        state, inside, HAS_STATE, tile, value, K, KP, V, BF, DTYPE
                    )
                    others = diagonal_selector(tile, K, KP, BF, True).to(DTYPE)
                    phi = times_first(x, dot(q, others, PRECISION), KP).to(DTYPE)
                    acc = dot_add(phi, other, acc, PRECISION)
            if STATE_FIRST:
                acc, below = add_pairs(acc, below, q, k, v, token, token, True, SCALE, PRECISION)
            for key in range(0, first, BQ):
                index = key + local
                k = load_tile(k_ptr, index, k_stride_t, feature, index < length, K).to(DTYPE)
                v = load_tile(v_ptr, index, v_stride_t, value, index < length, V).to(DTYPE)
                acc, below = add_pairs(acc, below, q, k, v, token, index, False, SCALE, PRECISION)
            inverse = 1 / below
            tl.store(
                out_ptr + token[:, None] * H * V + value[None, :],
                (acc * inverse[:, None]).to(out_ptr.dtype.element_ty),
                mask=real[:, None] & (value < V)[None, :],
            )
            if v_tile == 0:
                tl.store(inverse_ptr + token, inverse, mask=real)


@triton.jit
def add_pairs(acc, below, q, k, v, token, index, CAUSAL: tl.constexpr, SCALE, PRECISION):
    """acc and below with the pairs of queries `token` and keys `index`; no later keys."""
    s = dot(q, tl.trans(k), PRECISION)
    a = 1 + s * (SCALE + s * (0.5 * SCALE * SCALE))
    if CAUSAL:
        a = tl.where(index[None, :] <= token[:, None], a, 0.0)
    below += tl.sum(a, 1)
    return dot_add(a.to(v.dtype), v, acc, PRECISION), below
