"""Output kernel: the state before a segment, and exact attention inside it."""

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
from based.ops.tensor_core import dot, dot_add


@triton.jit
def load_rows(segment_ptr, strip_ptr, in_segment, in_strip, place, exists, value, V: tl.constexpr):
    """Rows `place` of a state, float32 [., BV]: its strip's part and what came before that."""
    offset = place[:, None] * V + value[None, :]
    mask = exists[:, None] & (value < V)[None, :]
    rows = tl.load(segment_ptr + offset, mask=mask & in_segment, other=0.0).to(tl.float32)
    return rows + tl.load(strip_ptr + offset, mask=mask & in_strip, other=0.0)


@triton.jit
def load_entries(segment_ptr, strip_ptr, in_segment, in_strip, place, exists):
    """Entries `place` of a normaliser, float32, likewise."""
    entries = tl.load(segment_ptr + place, mask=exists & in_segment, other=0.0)
    return entries + tl.load(strip_ptr + place, mask=exists & in_strip, other=0.0)


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

    Grid: blocks of BQ queries, heads, value tiles.
    """
    BLOCKS: tl.constexpr = LENGTH // BQ
    TILES: tl.constexpr = (K * K // 2 + BF - 1) // BF
    segment, head, v_tile = tl.program_id(0) // BLOCKS, tl.program_id(1), tl.program_id(2)
    v_tile = v_tile % ((V + BV - 1) // BV)
    begin = tl.load(segments_ptr + segment * 6 + 1)
    end = tl.load(segments_ptr + segment * 6 + 2)
    strip = tl.load(segments_ptr + segment * 6 + 3).to(tl.int64)
    in_segment = tl.load(segments_ptr + segment * 6 + 4) > 0
    first = begin + (tl.program_id(0) % BLOCKS) * BQ
    if first < end:
        feature = tl.arange(0, KP)
        value = v_tile * BV + tl.arange(0, BV)
        token = first + tl.arange(0, BQ)
        place = token.to(tl.int64)
        q = tl.load(
            q_ptr + place[:, None] * q_stride_t + head * q_stride_h + feature[None, :],
            mask=(token < end)[:, None] & (feature < K)[None, :],
            other=0.0,
        ).to(DTYPE)
        acc = tl.zeros([BQ, BV], tl.float32)
        below = tl.zeros([BQ], tl.float32)
        if in_segment | HAS_STATE:
            numerator_ptr += (segment.to(tl.int64) * H + head) * F * V
            normaliser_ptr += (segment.to(tl.int64) * H + head) * F
            strip_numerator_ptr += (strip * H + head) * F * V
            strip_normaliser_ptr += (strip * H + head) * F
            for tile in tl.static_range(TILES):
                P1, P2 = diagonal_selectors(tile, K, KP, BF)
                phi = dot(q, P1.to(DTYPE), PRECISION)
                phi *= dot(q, P2.to(DTYPE), PRECISION)
                phi *= diagonal_weights(tile, K, BF)[None, :]
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
                acc = dot_add(phi.to(DTYPE), state.to(DTYPE), acc, PRECISION)
            R1, R2 = rest_selectors(K, KP, BR)
            b1, b2 = rest_biases(K, BR)
            phi = dot(q, R1.to(DTYPE), PRECISION) + b1[None, :]
            phi *= dot(q, R2.to(DTYPE), PRECISION) + b2[None, :]
            phi *= rest_weights(K, BR, SCALE)[None, :]
            rows, exists = rest_places(K, BR)
            state = load_rows(
                numerator_ptr, strip_numerator_ptr, in_segment, HAS_STATE, rows, exists, value, V
            )
            acc = dot_add(phi.to(DTYPE), state.to(DTYPE), acc, PRECISION)

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
            constant = load_entries(
                normaliser_ptr,
                strip_normaliser_ptr,
                in_segment,
                HAS_STATE,
                0 * feature,
                feature == 0,
            )
            wide = q.to(tl.float32)
            terms = dot(wide, pairs, PRECISION) + SCALE * linear[None, :]
            below = tl.sum(wide * terms, 1) + tl.sum(constant, 0)
        for key in range(begin, first + BQ, BK):
            index = key + tl.arange(0, BK)
            row = index.to(tl.int64)
            k = tl.load(
                k_ptr + row[None, :] * k_stride_t + head * k_stride_h + feature[:, None],
                mask=(index < end)[None, :] & (feature < K)[:, None],
                other=0.0,
            ).to(DTYPE)
            v = tl.load(
                v_ptr + row[:, None] * v_stride_t + head * v_stride_h + value[None, :],
                mask=(index < end)[:, None] & (value < V)[None, :],
                other=0.0,
            ).to(DTYPE)
            s = dot(q, k, PRECISION) * SCALE
            a = tl.where(index[None, :] <= token[:, None], 1 + s * (1 + 0.5 * s), 0.0)
            below += tl.sum(a, 1)
            acc = dot_add(a.to(DTYPE), v, acc, PRECISION)
        out = acc / below[:, None]
        tl.store(
            out_ptr + (place[:, None] * H + head) * V + value[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=(token < end)[:, None] & (value < V)[None, :],
        )
        if v_tile == 0:
            tl.store(denominator_ptr + place * H + head, below, mask=token < end)
