"""What all kernels share: rows of a head, and which keys and queries see each other.

Positions are those of keys: P = S - T past keys, then the T tokens. Both bounds grow
with the position, so that a block's first and last rows bound the whole block.
"""

import triton
import triton.language as tl

# Compiled once for all values of these.
LENGTHS = ("T", "S", "window")


@triton.jit
def load_rows(x_ptr, start, end, rows: tl.constexpr, channel, stride, D: tl.constexpr):
    """`rows` rows of one head from `start` on, [rows, BD]; zeros from row `end` on."""
    row = tl.arange(0, rows)
    # Only the tile's beginning can be beyond 2^31 elements.
    x_ptr += tl.cast(start, tl.int64) * stride
    mask = (row < end - start)[:, None] & (channel < D)[None, :]
    return tl.load(x_ptr + row[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x_ptr, start, end, channel, stride, D: tl.constexpr, tile):
    """Writes what `load_rows` reads, rounded to x's dtype."""
    row = tl.arange(0, tile.shape[0])
    x_ptr += tl.cast(start, tl.int64) * stride
    mask = (row < end - start)[:, None] & (channel < D)[None, :]
    place = row[:, None] * stride + channel[None, :]
    tl.store(x_ptr + place, tile.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def within(position, first, end):
    """first <= position < end."""
    return (position >= first) & (position < end)


@triton.jit
def first_key(
    position, row, edges_ptr, past_ptr, P, S, window, PACKED: tl.constexpr, PAST: tl.constexpr
):
    """The first key that the query at `position` sees; the last is its own."""
    first = tl.maximum(position - window + 1, 0)
    if PACKED:
        first = tl.maximum(first, tl.load(edges_ptr + position))
    if PAST:
        first = tl.maximum(first, (P - tl.load(past_ptr + row)).to(tl.int32))
    return first


@triton.jit
def end_of_queries(
    position, row, edges_ptr, past_ptr, P, S, window, PACKED: tl.constexpr, PAST: tl.constexpr
):
    """The position after the last query that sees the key at `position`; that if none does."""
    end = tl.minimum(position + window, S)
    if PACKED:
        end = tl.minimum(end, tl.load(edges_ptr + S + position))
    if PAST:
        end = tl.where(position < P - tl.load(past_ptr + row), position, end)
    return end
