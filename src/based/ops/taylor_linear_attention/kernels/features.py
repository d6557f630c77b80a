"""Packed features on chip: products of selections, so that nothing is gathered.

A diagonal column of the feature map is x_i x_(i+r), r < K/2. Columns come in
tiles of BF / KP whole diagonals, KP columns each (KP is K, padded), so the first
factor is x itself, repeated, and the second is x times a constant 0/1 matrix: one
small matrix product and one multiplication in registers. The "rest" is the K
linear terms, padded to KP, and the half diagonal r = K/2, padded likewise.
Taylor weights stand in the selecting matrices. `features.py` a folder up defines
the order in memory.
"""

import triton
import triton.language as tl


@triton.jit
def diagonal_selector(tile, K: tl.constexpr, KP: tl.constexpr, BF: tl.constexpr, QUERIES):
    """What takes x to the second factors of diagonal tile number `tile`, [KP, BF], float32.

    For queries with their Taylor weights: 1/(2K) for squares, 1/K for products.
    """
    column = tile * BF + tl.arange(0, BF)
    shift, i = column // KP, column % KP
    weight = tl.where((i < K) & (shift < K // 2), 1.0, 0.0)
    if QUERIES:
        weight *= tl.where(shift == 0, 0.5 / K, 1.0 / K)
    row = tl.arange(0, KP)[:, None]
    return tl.where(row == ((i + shift) % K)[None, :], weight[None, :], 0.0)


@triton.jit
def diagonal_places(tile, K: tl.constexpr, KP: tl.constexpr, BF: tl.constexpr):
    """Where the tile's columns stand in a state, and which of them exist, [BF] each."""
    column = tile * BF + tl.arange(0, BF)
    shift, i = column // KP, column % KP
    return 1 + K + shift * K + i, (i < K) & (shift < K // 2)


@triton.jit
def twice_places(K: tl.constexpr, KP: tl.constexpr):
    """The rest's places, [2 KP], with the half diagonal taken twice, for all i < K."""
    row = tl.arange(0, 2 * KP)
    i = row % KP
    return tl.where(row < KP, 1 + i, 1 + K + K * K // 2 + i % (K // 2)), i < K


@triton.jit
def mixer(normaliser, K: tl.constexpr, KP: tl.constexpr, QUERIES, dtype: tl.constexpr):
    """[KP, 4 KP]: takes x to x, x rolled by K/2, and (in two parts) x times `normaliser`.

    The roll has the weight of the half diagonal taken twice. The two parts keep
    twice the digits of bfloat16.
    """
    row, column = tl.arange(0, KP)[:, None], tl.arange(0, 4 * KP)[None, :]
    block, j = column // KP, column % KP
    half = 0.5
    if QUERIES:
        half = 0.5 / K
    roll = (block == 1) & (j < K) & (row == (j + K // 2) % K)
    matrix = tl.where(roll, half, tl.where((block == 0) & (row == j), 1.0, 0.0))
    coarse = normaliser.to(dtype).to(tl.float32)
    matrix = tl.where(block == 2, coarse, matrix)
    return tl.where(block == 3, normaliser - coarse, matrix).to(dtype)


@triton.jit
def symmetric_places(K: tl.constexpr, KP: tl.constexpr):
    """Where x_i x_j stands in a state, i, j = row, column % KP, [KP, 4 KP], and which exist."""
    i, j = tl.arange(0, KP)[:, None], tl.arange(0, 4 * KP)[None, :] % KP
    shift = (j - i + K) % K
    above = (shift < K // 2) | ((shift == K // 2) & (i < K // 2))
    place = tl.where(above, shift * K + i, (K - shift) * K + j)
    return 1 + K + place, (i < K) & (j < K)


@triton.jit
def symmetric_weights(K: tl.constexpr, KP: tl.constexpr, QUERIES):
    """Twice the Taylor weights of squares, once those of products, [KP, 4 KP].

    So that x (weights * z) is the derivative of sum_(i <= j) z_ij x_i x_j, and half of
    x (weights * z) x the sum itself.
    """
    if QUERIES:
        return tl.full((KP, 4 * KP), 1.0 / K, tl.float32)
    i, j = tl.arange(0, KP)[:, None], tl.arange(0, 4 * KP)[None, :] % KP
    return tl.where(i == j, 2.0, 1.0)


@triton.jit
def first_selector(KP: tl.constexpr, ROWS: tl.constexpr):
    """What takes x to itself repeated, [ROWS, KP]."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, KP)[None, :]
    return (row % KP == column).to(tl.float32)


@triton.jit
def rest_selector(K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr, QUERIES):
    """What takes x to the second factors of the half diagonal taken once, [BR, KP]."""
    row, column = tl.arange(0, BR)[:, None], tl.arange(0, KP)[None, :]
    i = row - KP
    half = (i >= 0) & (i < K // 2) & (column == i + K // 2)
    weight = 1.0
    if QUERIES:
        weight = 1.0 / K
    return tl.where(half, weight, 0.0)


@triton.jit
def rest_biases(K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr, SCALE: tl.constexpr, QUERIES):
    """The second factor of linear terms, [BR], and the constant feature, last of 2 KP rows."""
    row = tl.arange(0, BR)
    linear = 1.0
    if QUERIES:
        linear = SCALE
    return tl.where(row < K, linear, 0.0), tl.where(row == 2 * KP - 1, 1.0, 0.0)


@triton.jit
def rest_places(K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
    """Where those rows stand in a state, and which of them exist, [BR] each."""
    row = tl.arange(0, BR)
    i = row - KP
    half = (i >= 0) & (i < K // 2)
    place = tl.where(row < K, 1 + row, tl.where(half, 1 + K + K * K // 2 + i, 0))
    return place, (row < K) | half | (row == 2 * KP - 1)


@triton.jit
def normaliser_places(K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
    """Where (rest feature) x_j stands in a state, [BR, KP], and which of them count.

    Row i < K holds the products x_i x_j, each pair once; the constant's row x_j.
    """
    i, j = tl.arange(0, BR)[:, None], tl.arange(0, KP)[None, :]
    shift = (j - i + K) % K
    pair = (i < K) & ((shift < K // 2) | ((shift == K // 2) & (i < K // 2)))
    constant = i == 2 * KP - 1
    place = tl.where(constant, 1 + j, 1 + K + shift * K + i)
    return place, (pair | constant) & (j < K)


@triton.jit
def normaliser_weights(K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr, SCALE: tl.constexpr):
    """What the Taylor weights of queries lack there, [BR, KP]: the linear terms have theirs."""
    i, j = tl.arange(0, BR)[:, None], tl.arange(0, KP)[None, :]
    return tl.where(i == j, 0.5 * SCALE, SCALE)
