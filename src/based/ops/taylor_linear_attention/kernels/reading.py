"""What the kernels that read states share: a segment's entry in the tables, its state, its use.

A segment's state is the sum of what its strip gathered before it (after it, for
gradients) and of what lies beyond the strip. `pointers` are the four of `States`.
"""

import triton
import triton.language as tl

from based.ops.taylor_linear_attention.kernels.features import (
    diagonal_places,
    mixer,
    symmetric_places,
    symmetric_weights,
    twice_places,
)
from based.ops.tensor_core import dot, dot_add


@triton.constexpr_function
def state_first(K):
    """Whether a tile's loads are hidden behind its products with the state, which come first.

    Not where a state is many tiles: on sm_90 Triton 3.6 computes something else then, with
    no warning (the tests of feature_dim 24 and 32 on a GPU show it).
    """
    return K <= 16


@triton.jit
def segment_of(segments_ptr, H):
    """This program's segment and head (heads beside each other), first token, length, strip."""
    segment, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    row = segments_ptr + segment * 6
    begin, end, strip = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return segment, head, begin.to(tl.int64), end - begin, strip.to(tl.int64)


@triton.jit
def state_of(pointers, segment, strip, head, H, F: tl.constexpr, V: tl.constexpr):
    """The pointers moved to one segment and head."""
    numerator, normaliser, strip_numerator, strip_normaliser = pointers
    inner, outer = segment * H + head, strip * H + head
    return (
        numerator + inner * F * V,
        normaliser + inner * F,
        strip_numerator + outer * F * V,
        strip_normaliser + outer * F,
    )


@triton.jit
def load_tile(ptr, row, stride, column, real, COLUMNS: tl.constexpr):
    """[rows, columns] of a tensor; zeros where a row is not real or a column does not exist."""
    mask = real[:, None] & (column < COLUMNS)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_numerator(pointers, in_segment, in_strip, place, mask):
    """Entries of a numerator, float32."""
    entries = tl.load(pointers[0] + place, mask=mask & in_segment, other=0.0).to(tl.float32)
    if in_strip:
        entries += tl.load(pointers[2] + place, mask=mask, other=0.0)
    return entries


@triton.jit
def load_normaliser(pointers, in_segment, in_strip, place, mask):
    """Entries of a normaliser, float32."""
    entries = tl.load(pointers[1] + place, mask=mask & in_segment, other=0.0)
    if in_strip:
        entries += tl.load(pointers[3] + place, mask=mask, other=0.0)
    return entries


@triton.jit
def load_diagonals(
    pointers, in_segment, in_strip, tile, value, K, KP, V, BF: tl.constexpr, dtype: tl.constexpr
):
    """A numerator's rows of diagonal tile number `tile`, [BF, BV]."""
    place, exists = diagonal_places(tile, K, KP, BF)
    offset, mask = place[:, None] * V + value[None, :], exists[:, None] & (value < V)[None, :]
    return load_numerator(pointers, in_segment, in_strip, offset, mask).to(dtype)


@triton.jit
def load_rest(pointers, in_segment, in_strip, value, K, KP, V, dtype: tl.constexpr):
    """Its rows of the linear terms and of the half diagonal taken twice, [2 KP, BV]."""
    place, exists = twice_places(K, KP)
    offset, mask = place[:, None] * V + value[None, :], exists[:, None] & (value < V)[None, :]
    return load_numerator(pointers, in_segment, in_strip, offset, mask).to(dtype)


@triton.jit
def load_mixer(pointers, in_segment, in_strip, K, KP, QUERIES, dtype: tl.constexpr):
    """`mixer` of a normaliser's second-order terms, made symmetric."""
    place, exists = symmetric_places(K, KP)
    entries = load_normaliser(pointers, in_segment, in_strip, place, exists)
    return mixer(entries * symmetric_weights(K, KP, QUERIES), K, KP, QUERIES, dtype)


@triton.jit
def mix(x, matrix, KP: tl.constexpr, PRECISION: tl.constexpr):
    """x, x rolled and weighted, and x times the normaliser, float32 [., KP], all in registers."""
    ROWS: tl.constexpr = x.shape[0]
    mixed = tl.reshape(dot(x, matrix, PRECISION), (ROWS, 2, 2, KP))
    even, odd = tl.split(tl.permute(mixed, (0, 3, 1, 2)))
    wide, coarse = tl.split(even)
    rolled, fine = tl.split(odd)
    return wide, rolled, coarse + fine


@triton.jit
def times_first(x, second, KP: tl.constexpr):
    """Features from their second factors, [., BF]: times x, repeated.

    In float32: around products in bfloat16 ptxas waits for every single wgmma.
    """
    ROWS: tl.constexpr = second.shape[0]
    BF: tl.constexpr = second.shape[1]
    product = tl.reshape(second, (ROWS, BF // KP, KP)) * x[:, None, :]
    return tl.reshape(product, (ROWS, BF))


@triton.jit
def add_rest(x, rolled, linear, rest, total, KP: tl.constexpr, PRECISION: tl.constexpr):
    """total + (linear * x and x * rolled, beside each other) @ rest."""
    ROWS: tl.constexpr = x.shape[0]
    phi = tl.permute(tl.join(x * linear, x * rolled), (0, 2, 1))
    phi = tl.reshape(phi, (ROWS, 2 * KP)).to(rest.dtype)
    return dot_add(phi, rest, total, PRECISION)


@triton.jit
def through_rest(y, rolled, linear, rest, KP: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of x through `add_rest`, where y is its result's."""
    ROWS: tl.constexpr = y.shape[0]
    d_phi = tl.reshape(dot(y, tl.trans(rest), PRECISION), (ROWS, 2, KP))
    d_linear, d_half = tl.split(tl.permute(d_phi, (0, 2, 1)))
    # The half diagonal taken twice is symmetric: both factors get the same.
    return d_linear * linear + 2 * d_half * rolled


@triton.jit
def through_diagonals(x, second, d_phi, selector, KP: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of x, [., KP], where phi is x, repeated, times second = x @ selector."""
    ROWS: tl.constexpr = second.shape[0]
    BF: tl.constexpr = second.shape[1]
    d_x = tl.sum(tl.reshape(d_phi * second, (ROWS, BF // KP, KP)), 1)
    d_second = times_first(x, d_phi, KP).to(selector.dtype)
    return dot_add(d_second, tl.trans(selector), d_x, PRECISION)
