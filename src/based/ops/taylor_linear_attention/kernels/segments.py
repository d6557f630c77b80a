"""How a batch is divided for the kernels: segments, and strips of consecutive segments.

Inside a segment attention is exact over pairs of tokens; everything earlier is
read from the state at the segment's start. A strip is a run of segments that one
program walks, so a segment's state is the sum of two: what its strip gathered
before it, and what earlier strips did. All of it is tables on the device: a
packed batch costs no synchronisation.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from based.ops.packed import once_a_batch


class Segments(NamedTuple):
    """Tables of a batch whose tokens stand in one row, sequence after sequence.

    segments: sequence, first token, end, strip, number in its strip, and whether
    it is its strip's last. strips: sequence, first token, end, first segment.
    Unused rows have no tokens.
    """

    segments: Int[Tensor, "M 6"]
    strips: Int[Tensor, "S 4"]
    strip_edges: Int[Tensor, " E"]
    carried: bool
    """Whether running sums pass from strip to strip."""
    padded: bool
    """Whether there may be unused rows."""


@once_a_batch
def divide(
    cu_seqlens: Int[Tensor, " E"], num_segments: int, num_strips: int, length: int, per_strip: int
) -> Segments:
    """Tables for sequences with the given boundaries; the counts may be upper bounds."""
    cu_seqlens = cu_seqlens.long()
    segment_edges, sequence, number, first, end = _cut(cu_seqlens, num_segments, length)
    strip_edges, *strips = _cut(cu_seqlens, num_strips, length * per_strip)
    place = number % per_strip
    last = (place == per_strip - 1) | (end == cu_seqlens[1:][sequence])
    strip = strip_edges[sequence] + number // per_strip
    segments = torch.stack([sequence, first, end, strip, place, last.long()], dim=1)
    first_segment = segment_edges[strips[0]] + strips[1] * per_strip
    strips = torch.stack([strips[0], strips[2], strips[3], first_segment], dim=1)
    return Segments(segments.int(), strips.int(), strip_edges.int(), carried=True, padded=True)


def _cut(cu_seqlens: Tensor, count: int, length: int) -> tuple[Tensor, ...]:
    """Pieces of at most `length` tokens: edges by sequence; each one's sequence, number, ends."""
    pieces = (cu_seqlens.diff() + length - 1) // length
    edges = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
    piece = torch.arange(count, device=cu_seqlens.device)
    sequence = torch.searchsorted(edges[1:].contiguous(), piece, right=True)
    exists = sequence < len(pieces)
    sequence = sequence.clamp(max=len(pieces) - 1)
    number = piece - edges[sequence]
    first = cu_seqlens[sequence] + number * length
    end = torch.minimum(first + length, cu_seqlens[1:][sequence])
    return edges, sequence, number, first.where(exists, 0), end.where(exists, 0)


@lru_cache(maxsize=64)
def divide_evenly(
    rows: int, tokens: int, length: int, per_strip: int, device: torch.device
) -> Segments:
    """Tables for `rows` sequences of `tokens` tokens each."""
    edges = torch.arange(rows + 1) * tokens
    count = rows * -(-tokens // length)
    strips = rows * -(-tokens // (length * per_strip))
    made = divide(edges, count, strips, length, per_strip)
    return made._replace(
        segments=made.segments.to(device),
        strips=made.strips.to(device),
        strip_edges=made.strip_edges.to(device),
        carried=strips > rows,
        padded=False,
    )
