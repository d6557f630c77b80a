"""Packed features on chip: products of selections, so that nothing is gathered or reshaped.

A column of the feature map is one product of two entries of x (or of 1), so the
map is (x P1 + b1) * (x P2 + b2) with constant 0/1 matrices: two small matrix
products and one multiplication in registers. Columns come in tiles: the
"diagonal" ones x_i x_(i+r), r < K/2, and the "rest": the constant, the K linear
terms and the half diagonal r = K/2. `features.py` defines the order in memory.
"""

import triton
import triton.language as tl


@triton.jit
def diagonal_selectors(tile, K: tl.constexpr, KP: tl.constexpr, BF: tl.constexpr):
    """P1 and P2, [KP, BF], of diagonal tile number `tile`."""
    column = tile * BF + tl.arange(0, BF)
    row = tl.arange(0, KP)[:, None]
    first = column % K
    second = (first + column // K) % K
    inside = column < K * K // 2
    first = (row == first[None, :]) & inside[None, :]
    second = (row == second[None, :]) & inside[None, :]
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def diagonal_weights(tile, K: tl.constexpr, BF: tl.constexpr):
    """The query's Taylor weights, [BF]: 1/(2K) for squares, 1/K for products."""
    column = tile * BF + tl.arange(0, BF)
    return tl.where(column < K, 0.5 / K, 1.0 / K)


@triton.jit
def diagonal_places(tile, K: tl.constexpr, BF: tl.constexpr):
    """Where the tile's columns stand in a state, and which of them exist, [BF] each."""
    column = tile * BF + tl.arange(0, BF)
    return 1 + K + column, column < K * K // 2


@triton.jit
def rest_selectors(K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
    """P1 and P2, [KP, BR], of the rest."""
    column = tl.arange(0, BR)
    row = tl.arange(0, KP)[:, None]
    linear = (column >= 1) & (column <= K)
    half = (column > K) & (column <= K + K // 2)
    first = tl.where(linear, column - 1, tl.where(half, column - K - 1, KP))
    second = tl.where(half, column - K - 1 + K // 2, KP)
    return (row == first[None, :]).to(tl.float32), (row == second[None, :]).to(tl.float32)


@triton.jit
def rest_biases(K: tl.constexpr, BR: tl.constexpr):
    """b1 and b2, [BR]: 1 where a column's factor is the constant."""
    column = tl.arange(0, BR)
    return (column == 0).to(tl.float32), (column <= K).to(tl.float32)


@triton.jit
def rest_weights(K: tl.constexpr, BR: tl.constexpr, SCALE: tl.constexpr):
    """The query's Taylor weights, [BR]: 1, 1/sqrt(K), 1/K."""
    column = tl.arange(0, BR)
    return tl.where(column == 0, 1.0, tl.where(column <= K, SCALE, 1.0 / K))


@triton.jit
def rest_places(K: tl.constexpr, BR: tl.constexpr):
    """Where the rest's columns stand in a state, and which of them exist, [BR] each."""
    column = tl.arange(0, BR)
    return tl.where(column <= K, column, column + K * K // 2), column <= K + K // 2


@triton.jit
def half_selectors(K: tl.constexpr, KP: tl.constexpr):
    """P1 and P2, [KP, KP], of the half diagonal taken twice: x_i x_(i+K/2) for all i."""
    i = tl.arange(0, KP)[None, :]
    row = tl.arange(0, KP)[:, None]
    first = (row == i) & (i < K)
    second = (row == (i + K // 2) % K) & (i < K)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def half_places(K: tl.constexpr, KP: tl.constexpr):
    """Where they stand in a state, each place twice, [KP], and which exist; weights 1/(2K)."""
    i = tl.arange(0, KP)
    return 1 + K + K * K // 2 + i % (K // 2), i < K


@triton.jit
def pair_places(K: tl.constexpr, KP: tl.constexpr):
    """Where x_i x_j stands in a state, [KP, KP], and which (i, j) hold each pair once."""
    i = tl.arange(0, KP)[:, None]
    j = tl.arange(0, KP)[None, :]
    shift = (j - i + K) % K
    holds = (shift < K // 2) | ((shift == K // 2) & (i < K // 2))
    return 1 + K + shift * K + i, holds & (i < K) & (j < K)


@triton.jit
def pair_weights(K: tl.constexpr, KP: tl.constexpr):
    """The query's Taylor weights of x_i x_j, [KP, KP]."""
    i = tl.arange(0, KP)[:, None]
    j = tl.arange(0, KP)[None, :]
    return tl.where(i == j, 0.5 / K, 1.0 / K)


@triton.jit
def normaliser_places(K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
    """Where (rest feature) x_j stands in a state, [BR, KP], and which of them count.

    Row 0 holds the linear terms; row 1 + i the products x_i x_j, each pair once.
    """
    row = tl.arange(0, BR)[:, None]
    j = tl.arange(0, KP)[None, :]
    i = row - 1
    shift = (j - i + K) % K
    pair = (row >= 1) & (row <= K) & ((shift < K // 2) | ((shift == K // 2) & (i < K // 2)))
    place = tl.where(row == 0, 1 + j, 1 + K + shift * K + i)
    return place, (pair | (row == 0)) & (j < K)


@triton.jit
def normaliser_weights(K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr, SCALE: tl.constexpr):
    """The query's Taylor weights of the same, [BR, KP]."""
    row = tl.arange(0, BR)[:, None]
    j = tl.arange(0, KP)[None, :]
    pair = tl.where(row == j + 1, 0.5 / K, 1.0 / K)
    return tl.where(row == 0, SCALE, pair)
