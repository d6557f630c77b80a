"""State kernels: what each segment and strip adds to the state, and their running sums."""

import triton
import triton.language as tl

from based.ops.taylor_linear_attention.kernels.features import (
    diagonal_places,
    diagonal_selector,
    first_selector,
    normaliser_places,
    normaliser_weights,
    rest_biases,
    rest_places,
    rest_selector,
)
from based.ops.tensor_core import dot, dot_add, opaque


@triton.jit
def sum_states(
    x_ptr,  # keys, or queries: [T, H, K]
    y_ptr,  # values, or output gradients over denominators: [T, H, V]
    delta_ptr,  # -(d_out . out) / denominator, [H, T]; queries only
    strips_ptr,
    numerator_ptr,  # before (after, for queries) each segment in its strip: [M, H, F, V]
    normaliser_ptr,  # the same: [M, H, F]
    strip_numerator_ptr,  # of whole strips: [S, H, F, V]
    strip_normaliser_ptr,  # [S, H, F]
    x_stride_t,
    x_stride_h,
    y_stride_t,
    y_stride_h,
    T,
    H,
    QUERIES: tl.constexpr,  # gradients: queries instead of keys, last segment first
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LENGTH: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_t phi(x_t) y_t^T and sum_t phi(x_t) w_t over the tokens of a strip.

    Grid: strips x heads, diagonal tiles x value tiles. w is 1 for keys, delta for queries.
    """
    strip, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    TILES: tl.constexpr = (K // 2 * KP + BF - 1) // BF
    ROWS: tl.constexpr = 64  # of one product; features repeat x every KP of them
    # The remainders by 1 fold to 0, and with them the conditions below.
    tile, v_tile = tl.program_id(1) % TILES, tl.program_id(1) // TILES % ((V + BV - 1) // BV)
    begin = tl.load(strips_ptr + strip * 4 + 1).to(tl.int64)
    end = tl.load(strips_ptr + strip * 4 + 2)
    first_segment = tl.load(strips_ptr + strip * 4 + 3).to(tl.int64)
    if begin < end:
        dtype = numerator_ptr.dtype.element_ty
        feature = tl.arange(0, KP)
        value = v_tile * BV + tl.arange(0, BV)
        once = first_selector(KP, ROWS).to(dtype)
        selector = tl.trans(diagonal_selector(tile, K, KP, BF, QUERIES).to(dtype))
        half = rest_selector(K, KP, ROWS, QUERIES).to(dtype)
        linear, one = rest_biases(K, KP, ROWS, SCALE, QUERIES)
        diagonal = tl.zeros([BF, BV], tl.float32)
        rest = tl.zeros([ROWS, BV], tl.float32)
        # Rest features times x w: sums of x and of x x^T, the normaliser.
        pairs = tl.zeros([ROWS, KP], tl.float32)
        constant = 0.0
        local = tl.arange(0, C)
        x_ptr += begin * x_stride_t + head * x_stride_h
        y_ptr += begin * y_stride_t + head * y_stride_h
        delta_ptr += head.to(tl.int64) * T + begin
        x_offset = local[None, :] * x_stride_t + feature[:, None]
        y_offset = local[:, None] * y_stride_t + value[None, :]
        length = (end - begin).to(tl.int32)
        count = (length + LENGTH - 1) // LENGTH
        for number in range(count):
            place = number
            if QUERIES:
                place = count - 1 - number
            if number > 0:
                slot = (first_segment + place) * H + head
                store_state(
                    numerator_ptr + slot * F * V,
                    normaliser_ptr + slot * F,
                    diagonal,
                    rest,
                    pairs,
                    constant,
                    tile,
                    v_tile,
                    value,
                    K,
                    KP,
                    V,
                    QUERIES,
                    SCALE,
                )
            for chunk in range(LENGTH // C):
                token = place * LENGTH + chunk * C
                real = local < length - token
                x = tl.load(
                    x_ptr + token.to(tl.int64) * x_stride_t + x_offset,
                    mask=real[None, :] & (feature < K)[:, None],
                    other=0.0,
                ).to(dtype)
                y = tl.load(
                    y_ptr + token.to(tl.int64) * y_stride_t + y_offset,
                    mask=real[:, None] & (value < V)[None, :],
                    other=0.0,
                ).to(dtype)
                xw = x
                if QUERIES:
                    delta = tl.load(delta_ptr + token + local, mask=real, other=0.0)
                    xw = (x.to(tl.float32) * delta[None, :]).to(dtype)
                    constant += tl.sum(delta, 0)
                first = dot(once, x, PRECISION)
                phi = repeat_rows(first, BF) * dot(selector, x, PRECISION)
                diagonal = dot_add(phi.to(dtype), y, diagonal, PRECISION)
                if tile == 0:
                    phi_rest = first * (dot(half, x, PRECISION) + linear[:, None]) + one[:, None]
                    rest = dot_add(phi_rest.to(dtype), y, rest, PRECISION)
                    if v_tile == 0:
                        pairs = dot_add(phi_rest.to(dtype), tl.trans(xw), pairs, PRECISION)
            if not QUERIES:
                constant += tl.minimum(LENGTH, length - place * LENGTH).to(tl.float32)
        slot = strip * H + head
        store_state(
            strip_numerator_ptr + slot * F * V,
            strip_normaliser_ptr + slot * F,
            diagonal,
            rest,
            pairs,
            constant,
            tile,
            v_tile,
            value,
            K,
            KP,
            V,
            QUERIES,
            SCALE,
        )


@triton.jit
def repeat_rows(x, BF: tl.constexpr):
    """x, [ROWS, C], repeated to [BF, C]."""
    ROWS: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[None], (BF // ROWS, ROWS, C)), (BF, C))


@triton.jit
def store_state(
    numerator_ptr,
    normaliser_ptr,
    diagonal,
    rest,
    pairs,
    constant,
    tile,
    v_tile,
    value,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    QUERIES: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Writes one state in the layout of `features.py`."""
    dtype = numerator_ptr.dtype.element_ty
    if K <= 16:
        # Above, as it was when the GPU's tests passed.
        tile = opaque(tile)
    place, exists = diagonal_places(tile, K, KP, diagonal.shape[0])
    tl.store(
        numerator_ptr + place[:, None] * V + value[None, :],
        diagonal.to(dtype),
        mask=exists[:, None] & (value < V)[None, :],
    )
    if tile == 0:
        row, inside = rest_places(K, KP, rest.shape[0])
        tl.store(
            numerator_ptr + row[:, None] * V + value[None, :],
            rest.to(dtype),
            mask=inside[:, None] & (value < V)[None, :],
        )
        if v_tile == 0:
            if QUERIES:
                pairs *= normaliser_weights(K, KP, pairs.shape[0], SCALE)
            entry, holds = normaliser_places(K, KP, pairs.shape[0])
            tl.store(normaliser_ptr + entry, pairs, mask=holds)
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
    GROUP: tl.constexpr,  # strips in flight together
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
    for group in range(0, end - begin, GROUP):
        number = group + tl.arange(0, GROUP)
        strip = begin + number
        if REVERSE:
            strip = end - 1 - number
        place = states_ptr + (strip.to(tl.int64) * H + head)[:, None] * E + element[None, :]
        mask = (number < end - begin)[:, None] & inside[None, :]
        added = tl.load(place, mask=mask, other=0.0)
        tl.store(place, total[None, :] + tl.cumsum(added, 0) - added, mask=mask)
        total += tl.sum(added, 0)
    tl.store(final_ptr + row, total, mask=inside)
