"""What all kernels share: rows of a head, and which keys and queries see each other.

Positions are those of keys: P = S - T past keys, then the T tokens. Both bounds grow
with the position, so that a block's first and last rows bound the whole block.
"""

import triton
import triton.language as tl

# Compiled once for all values of these.
LENGTHS = ("T", "S", "window")


@triton.jit
def load_rows(x_ptr, index, real, channel, stride, D: tl.constexpr):
    """Rows `index` of one head, [., BD]; zeros where they are not real."""
    place = index.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(x_ptr + place, mask=real[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def store_rows(x_ptr, index, real, channel, stride, D: tl.constexpr, rows):
    """Writes what `load_rows` reads, rounded to x's dtype."""
    place = index.to(tl.int64)[:, None] * stride + channel[None, :]
    rows = rows.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + place, rows, mask=real[:, None] & (channel < D)[None, :])


@triton.jit
def first_key(position, row, edges_ptr, past_ptr, P, S, window, PACKED: tl.constexpr, PAST):
    """The first key that the query at `position` sees; the last is its own."""
    first = tl.maximum(position - window + 1, 0)
    if PACKED:
        first = tl.maximum(first, tl.load(edges_ptr + position))
    if PAST:
        first = tl.maximum(first, (P - tl.load(past_ptr + row)).to(tl.int32))
    return first


@triton.jit
def end_of_queries(position, row, edges_ptr, past_ptr, P, S, window, PACKED: tl.constexpr, PAST):
    """The position after the last query that sees the key at `position`; 0 if none does."""
    end = tl.minimum(position + window, S)
    if PACKED:
        end = tl.minimum(end, tl.load(edges_ptr + S + position))
    if PAST:
        end = tl.where(position < P - tl.load(past_ptr + row), 0, end)
    return end
