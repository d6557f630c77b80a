"""State kernels: what each segment and strip adds to the state, and their running sums."""

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
def sum_states(
    x_ptr,  # keys, or queries: [T, H, K]
    y_ptr,  # values, or output gradients: [T, H, V]
    denominator_ptr,  # of the outputs, [T, H]; queries only
    delta_ptr,  # gradients of denominators, [T, H]; queries only
    strips_ptr,
    numerator_ptr,  # before (after, for queries) each segment in its strip: [M, H, F, V]
    normaliser_ptr,  # the same: [M, H, F]
    strip_numerator_ptr,  # of whole strips: [S, H, F, V]
    strip_normaliser_ptr,  # [S, H, F]
    x_stride_t,
    x_stride_h,
    y_stride_t,
    y_stride_h,
    H,
    QUERIES: tl.constexpr,  # gradients: queries instead of keys, last segment first
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LENGTH: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_t phi(x_t) w_t y_t^T and sum_t phi(x_t) w_t over the tokens of a strip.

    Grid: strips, heads, diagonal tiles x value tiles. Keys: w = 1. Queries: y is
    divided by the denominator, the normaliser has w = delta.
    """
    strip, head = tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = (K * K // 2 + BF - 1) // BF
    tile, v_tile = tl.program_id(2) % TILES, tl.program_id(2) // TILES
    begin = tl.load(strips_ptr + strip * 4 + 1)
    end = tl.load(strips_ptr + strip * 4 + 2)
    first_segment = tl.load(strips_ptr + strip * 4 + 3).to(tl.int64)
    if begin < end:
        dtype = numerator_ptr.dtype.element_ty
        feature = tl.arange(0, KP)
        value = v_tile * BV + tl.arange(0, BV)
        P1, P2 = diagonal_selectors(tile, K, KP, BF)
        P1, P2 = tl.trans(P1.to(dtype)), tl.trans(P2.to(dtype))
        R1, R2 = rest_selectors(K, KP, BR)
        R1, R2 = tl.trans(R1.to(dtype)), tl.trans(R2.to(dtype))
        b1, b2 = rest_biases(K, BR)
        diagonal = tl.zeros([BF, BV], tl.float32)
        rest = tl.zeros([BR, BV], tl.float32)
        pairs = tl.zeros([KP, KP], tl.float32)
        linear = tl.zeros([KP], tl.float32)
        constant = 0.0
        weight = diagonal_weights(tile, K, BF)[:, None]
        count = (end - begin + LENGTH - 1) // LENGTH
        for number in range(count):
            place = number
            if QUERIES:
                place = count - 1 - number
            if number > 0:
                slot = (first_segment + place) * H + head
                _store(
                    numerator_ptr + slot * F * V,
                    normaliser_ptr + slot * F,
                    diagonal,
                    rest,
                    pairs,
                    linear,
                    constant,
                    tile,
                    v_tile,
                    value,
                    K,
                    KP,
                    V,
                    BF,
                    BR,
                    QUERIES,
                    SCALE,
                )
            for chunk in range(LENGTH // C):
                token = begin + place * LENGTH + chunk * C + tl.arange(0, C)
                real = token < end
                token = token.to(tl.int64)
                x = tl.load(
                    x_ptr + token[None, :] * x_stride_t + head * x_stride_h + feature[:, None],
                    mask=real[None, :] & (feature < K)[:, None],
                    other=0.0,
                ).to(dtype)
                y = tl.load(
                    y_ptr + token[:, None] * y_stride_t + head * y_stride_h + value[None, :],
                    mask=real[:, None] & (value < V)[None, :],
                    other=0.0,
                )
                w = real.to(tl.float32)
                if QUERIES:
                    below = tl.load(denominator_ptr + token * H + head, mask=real, other=1.0)
                    y = y.to(tl.float32) / below[:, None]
                    w = tl.load(delta_ptr + token * H + head, mask=real, other=0.0)
                y = y.to(dtype)
                u = dot(P1, x, PRECISION)
                phi = u * dot(P2, x, PRECISION)
                if QUERIES:
                    phi *= weight
                diagonal = dot_add(phi.to(dtype), y, diagonal, PRECISION)
                if tile == 0:
                    u = dot(R1, x, PRECISION) + b1[:, None]
                    phi = u * (dot(R2, x, PRECISION) + b2[:, None])
                    if QUERIES:
                        phi *= rest_weights(K, BR, SCALE)[:, None]
                    rest = dot_add(phi.to(dtype), y, rest, PRECISION)
                    if v_tile == 0:
                        xw = x.to(tl.float32) * w[None, :]
                        if QUERIES:
                            pairs = dot_add(xw, tl.trans(x.to(tl.float32)), pairs, PRECISION)
                        else:
                            pairs = dot_add(x, tl.trans(x), pairs, PRECISION)
                        linear += tl.sum(xw, 1)
                        constant += tl.sum(w, 0)
        slot = strip.to(tl.int64) * H + head
        _store(
            strip_numerator_ptr + slot * F * V,
            strip_normaliser_ptr + slot * F,
            diagonal,
            rest,
            pairs,
            linear,
            constant,
            tile,
            v_tile,
            value,
            K,
            KP,
            V,
            BF,
            BR,
            QUERIES,
            SCALE,
        )


@triton.jit
def _store(
    numerator_ptr,
    normaliser_ptr,
    diagonal,
    rest,
    pairs,
    linear,
    constant,
    tile,
    v_tile,
    value,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    QUERIES: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Writes one state in the layout of `features.py`."""
    dtype = numerator_ptr.dtype.element_ty
    place, exists = diagonal_places(tile, K, BF)
    tl.store(
        numerator_ptr + place[:, None] * V + value[None, :],
        diagonal.to(dtype),
        mask=exists[:, None] & (value < V)[None, :],
    )
    if tile == 0:
        place, exists = rest_places(K, BR)
        tl.store(
            numerator_ptr + place[:, None] * V + value[None, :],
            rest.to(dtype),
            mask=exists[:, None] & (value < V)[None, :],
        )
        if v_tile == 0:
            place, exists = pair_places(K, KP)
            feature = tl.arange(0, KP)
            if QUERIES:
                pairs *= pair_weights(K, KP)
                linear *= SCALE
            tl.store(normaliser_ptr + place, pairs, mask=exists)
            tl.store(normaliser_ptr + 1 + feature, linear, mask=feature < K)
            tl.store(normaliser_ptr, constant)


@triton.jit
def carry_states(
    states_ptr,  # of strips, [S, H, E]: sums on entry, what came before each on return
    initial_ptr,  # [N, H, E]
    final_ptr,  # [N, H, E]
    edges_ptr,
    H,
    E,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Exclusive running sum over the strips of each sequence. Grid: sequences, heads, blocks."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = element < E
    begin, end = tl.load(edges_ptr + sequence), tl.load(edges_ptr + sequence + 1)
    row = (sequence.to(tl.int64) * H + head) * E + element
    if HAS_INITIAL:
        total = tl.load(initial_ptr + row, mask=inside, other=0.0).to(tl.float32)
    else:
        total = tl.zeros([BLOCK], tl.float32)
    for number in range(end - begin):
        strip = begin + number
        if REVERSE:
            strip = end - 1 - number
        place = states_ptr + (strip.to(tl.int64) * H + head) * E + element
        added = tl.load(place, mask=inside, other=0.0)
        tl.store(place, total, mask=inside)
        total += added
    tl.store(final_ptr + row, total, mask=inside)
