"""Output kernel: the state before a segment, and exact attention inside it."""

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
from based.ops.tensor_core import dot, dot_add


@triton.jit
def load_rows(segment_ptr, strip_ptr, in_segment, in_strip, place, exists, value, V: tl.constexpr):
    """Rows `place` of a state, float32 [., BV]: its strip's part and what came before that."""
    offset = place[:, None] * V + value[None, :]
    mask = exists[:, None] & (value < V)[None, :]
    rows = tl.load(segment_ptr + offset, mask=mask & in_segment, other=0.0).to(tl.float32)
    if in_strip:
        rows += tl.load(strip_ptr + offset, mask=mask, other=0.0)
    return rows


@triton.jit
def load_entries(segment_ptr, strip_ptr, in_segment, in_strip, place, exists):
    """Entries `place` of a normaliser, float32, likewise."""
    entries = tl.load(segment_ptr + place, mask=exists & in_segment, other=0.0)
    if in_strip:
        entries += tl.load(strip_ptr + place, mask=exists, other=0.0)
    return entries


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    denominator_ptr,
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
    H,
    HAS_STATE: tl.constexpr,  # whether strips have predecessors
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
    """out_t = (phi(q_t) S + sum_i a_ti v_i) / (phi(q_t) z + sum_i a_ti), i in t's segment.

    Grid: segments, heads, value tiles. The state stays on chip for all of the
    segment's queries, with their Taylor weights already in it.
    """
    TILES: tl.constexpr = (K * K // 2 + BF - 1) // BF
    segment, head = tl.program_id(0), tl.program_id(1)
    v_tile = tl.program_id(2) % ((V + BV - 1) // BV)
    begin = tl.load(segments_ptr + segment * 6 + 1)
    end = tl.load(segments_ptr + segment * 6 + 2)
    strip = tl.load(segments_ptr + segment * 6 + 3).to(tl.int64)
    in_segment = tl.load(segments_ptr + segment * 6 + 4) > 0
    if begin < end:
        feature = tl.arange(0, KP)
        value = v_tile * BV + tl.arange(0, BV)
        q_ptr += begin.to(tl.int64) * q_stride_t + head * q_stride_h
        k_ptr += begin.to(tl.int64) * k_stride_t + head * k_stride_h
        v_ptr += begin.to(tl.int64) * v_stride_t + head * v_stride_h
        out_ptr += (begin.to(tl.int64) * H + head) * V
        denominator_ptr += begin.to(tl.int64) * H + head
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
        constant = tl.load(numerator_ptr + value, mask=(value < V) & in_segment, other=0.0).to(
            tl.float32
        )
        entry, exists = pair_places(K, KP)
        pairs = load_entries(
            normaliser_ptr, strip_normaliser_ptr, in_segment, HAS_STATE, entry, exists
        )
        pairs *= pair_weights(K, KP)
        vector = load_entries(
            normaliser_ptr, strip_normaliser_ptr, in_segment, HAS_STATE, 1 + feature, feature < K
        )
        vector *= SCALE
        count = tl.load(normaliser_ptr, mask=in_segment, other=0.0)
        if HAS_STATE:
            constant += tl.load(strip_numerator_ptr + value, mask=value < V, other=0.0)
            count += tl.load(strip_normaliser_ptr)

        for first in range(0, end - begin, BQ):
            token = first + tl.arange(0, BQ)
            real = token < end - begin
            q = tl.load(
                q_ptr + token[:, None] * q_stride_t + feature[None, :],
                mask=real[:, None] & (feature < K)[None, :],
                other=0.0,
            ).to(DTYPE)
            acc = tl.zeros([BQ, BV], tl.float32)
            below = tl.zeros([BQ], tl.float32)
            if with_state:
                phi = dot(q, P1, PRECISION) * dot(q, P2, PRECISION)
                acc = dot_add(phi.to(DTYPE), state, acc, PRECISION)
                if TILES > 1:
                    phi = dot(q, S1, PRECISION) * dot(q, S2, PRECISION)
                    acc = dot_add(phi.to(DTYPE), second, acc, PRECISION)
                for tile in tl.static_range(2, TILES):
                    Q1, Q2 = diagonal_selectors(tile, K, KP, BF)
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
                    other *= diagonal_weights(tile, K, BF)[:, None]
                    others = dot(q, Q1.to(DTYPE), PRECISION) * dot(q, Q2.to(DTYPE), PRECISION)
                    acc = dot_add(others.to(DTYPE), other.to(DTYPE), acc, PRECISION)
                halves = dot(q, H1, PRECISION) * dot(q, H2, PRECISION)
                acc = dot_add(halves.to(DTYPE), half, acc, PRECISION)
                acc = dot_add(q, linear, acc, PRECISION)
                acc += constant[None, :]
                wide = q.to(tl.float32)
                terms = dot(wide, pairs, PRECISION) + vector[None, :]
                below = tl.sum(wide * terms, 1) + count
            for key in range(0, first, BK):
                index = key + tl.arange(0, BK)
                k = tl.load(
                    k_ptr + index[None, :] * k_stride_t + feature[:, None],
                    mask=(feature < K)[:, None],
                    other=0.0,
                ).to(DTYPE)
                v = tl.load(
                    v_ptr + index[:, None] * v_stride_t + value[None, :],
                    mask=(value < V)[None, :],
                    other=0.0,
                ).to(DTYPE)
                s = dot(q, k, PRECISION)
                a = 1 + s * (SCALE + s * (0.5 * SCALE * SCALE))
                below += tl.sum(a, 1)
                acc = dot_add(a.to(DTYPE), v, acc, PRECISION)
            for key in tl.static_range(0, BQ, BK):
                index = first + key + tl.arange(0, BK)
                k = tl.load(
                    k_ptr + index[None, :] * k_stride_t + feature[:, None],
                    mask=(index < end - begin)[None, :] & (feature < K)[:, None],
                    other=0.0,
                ).to(DTYPE)
                v = tl.load(
                    v_ptr + index[:, None] * v_stride_t + value[None, :],
                    mask=(index < end - begin)[:, None] & (value < V)[None, :],
                    other=0.0,
                ).to(DTYPE)
                s = dot(q, k, PRECISION)
                a = 1 + s * (SCALE + s * (0.5 * SCALE * SCALE))
                a = tl.where(index[None, :] <= token[:, None], a, 0.0)
                below += tl.sum(a, 1)
                acc = dot_add(a.to(DTYPE), v, acc, PRECISION)
            tl.store(
                out_ptr + token[:, None] * H * V + value[None, :],
                (acc / below[:, None]).to(out_ptr.dtype.element_ty),
                mask=real[:, None] & (value < V)[None, :],
            )
            if v_tile == 0:
                tl.store(denominator_ptr + token * H, below, mask=real)
