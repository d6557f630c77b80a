"""Context parallel: one sequence over several ranks, each with one shard of its tokens.

Norms, MLPs and projections act on each token alone, so only mixers meet the edges.
A rank computes the state that its last sequence leaves by itself, all ranks
exchange these (fixed in size, so little travels), and each joins those before it
into the state that its first sequence goes on from: a prefix sum for Taylor linear
attention, the neighbours' last keys for windows, the last inputs for convolutions.
The rule of a mixer is its `join_segments`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from based.errors import BasedError
from based.mixers import Mixer, State
from based.models import Decoder

# Typed so that what it decorates keeps to the protocol of `Shard`.
_uncompiled: Any = torch.compiler.disable


class Tail(NamedTuple):
    """The last sequence of a shard: its first token there, and that token's position."""

    start: int
    position: int
    length: int


class Layout(NamedTuple):
    """How the sequences of a batch lie on the shards, seen from one of them."""

    tails: list[Tail]
    """Of every shard."""
    position: int
    """Of this shard's first token in its sequence."""
    origin: int
    """The shard in which that sequence begins."""
    edges: list[int]
    """Where this shard's sequences begin, and its length."""

    @staticmethod
    def of(bounds: Sequence[int], length: int, rank: int, size: int) -> Layout:
        """`bounds` are where all sequences begin, and the end; shards are `length` tokens."""
        tails = []
        for first in range(0, size * length, length):
            begin = bounds[bisect_left(bounds, first + length) - 1]
            start = max(begin - first, 0)
            tails.append(Tail(start, max(first - begin, 0), length - start))
        first = rank * length
        begin = bounds[bisect_right(bounds, first) - 1]
        inside = [bound - first for bound in bounds if first < bound < first + length]
        return Layout(tails, first - begin, begin // length, [0, *inside, length])


class SequenceShard:
    """This rank's place among those that share sequences; see `based.mixers.base.Shard`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._seen: tuple[Tensor | None, Layout] | None = None

    def columns(self, length: int) -> slice:
        """This rank's part of `length` tokens."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    @_uncompiled
    def mix(
        self, mixer: Mixer, x: Float[Tensor, "B T C"], cu_seqlens: Int[Tensor, " E"] | None
    ) -> Float[Tensor, "B T C"]:
        """The mixer's output on this shard; `cu_seqlens` are the bounds over all shards.

        Compiled blocks are cut in two here.
        """
        layout = self._layout(cu_seqlens, x.shape[1])
        tail = layout.tails[self.rank]
        own = mixer.segment_state(x[:, tail.start :], tail.position)
        gathered, states = self._exchange(mixer, own, layout, x)
        if layout.position == 0:
            out = _from_zero(mixer, x, layout.edges)
        else:
            before = mixer.init_state(x.shape[0])
            for shard in range(layout.origin, self.rank):
                _, position, length = layout.tails[shard]
                before = mixer.join_segments(before, states[shard], position, length)
            end = layout.edges[1]
            out, _ = mixer.mix(x[:, :end], before)
            if end < x.shape[1]:
                rest = [edge - end for edge in layout.edges[1:]]
                out = torch.cat([out, _from_zero(mixer, x[:, end:], rest)], dim=1)
        return _Together.apply(out, gathered)

    def _layout(self, cu_seqlens: Tensor | None, length: int) -> Layout:
        """Read from the device once for a batch, not once a layer."""
        if self._seen is None or self._seen[0] is not cu_seqlens or cu_seqlens is None:
            bounds = [0, self.size * length] if cu_seqlens is None else cu_seqlens.tolist()
            self._seen = (cu_seqlens, Layout.of(bounds, length, self.rank, self.size))
        return self._seen[1]

    def _exchange(
        self, mixer: Mixer, own: State, layout: Layout, x: Tensor
    ) -> tuple[Tensor, list[State]]:
        """Everyone's tail states, as they were gathered and as states."""
        names = [name for name, tensor in own.items() if tensor.is_floating_point()]
        shapes = [
            [(x.shape[0], *mixer.state_spec(tail.length, x.dtype)[name].shape) for name in names]
            for tail in layout.tails
        ]
        sizes = [[prod(shape) for shape in each] for each in shapes]
        flat = torch.cat([own[name].flatten() for name in names])
        flat = F.pad(flat, (0, max(map(sum, sizes)) - flat.numel()))
        gathered: Any = _AllGather.apply(flat, self.group)
        states = []
        for row, size, each in zip(gathered, sizes, shapes, strict=True):
            parts = zip(names, row[: sum(size)].split(size), each, strict=True)
            states.append(State({n: x.view(shape).to(own[n].dtype) for n, x, shape in parts}))
        return gathered, states


def split_sequences(model: Decoder, group: dist.ProcessGroup) -> SequenceShard:
    """From now on the model sees one shard of each sequence, and `group` has the others.

    Raises `BasedError` if a mixer cannot be split.
    """
    shard = SequenceShard(group)
    for mixer in model.mixers():
        if type(mixer).join_segments is Mixer.join_segments:
            raise BasedError(
                f"{type(mixer).__name__} has no rule to join segments, so its sequences cannot "
                "be split over ranks; set context_parallel to 1"
            )
        mixer.shard = shard
    return shard


def _from_zero(mixer: Mixer, x: Tensor, edges: list[int]) -> Tensor:
    """Sequences that begin in this shard."""
    if len(edges) == 2:
        return mixer.mix(x)[0]
    return mixer.mix_packed(x, torch.tensor(edges, device=x.device))[0]


class _AllGather(torch.autograd.Function):
    """Every rank's vector; the backward pass sums what all ranks made of this one's."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, " N"], group: dist.ProcessGroup) -> Float[Tensor, "R N"]:
        ctx.group = group
        out = x.new_empty(group.size(), len(x))
        dist.all_gather(list(out.unbind()), x, group=group)
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_out: Float[Tensor, "R N"]
    ) -> tuple[Float[Tensor, " N"], None]:
        total = d_out.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()], None


class _Together(torch.autograd.Function):
    """Returns `out`; a rank that used nothing gathered still joins the backward exchange."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gathered: Tensor) -> Tensor:
        ctx.like = gathered.shape, gathered.dtype, gathered.device
        return out.view_as(out)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return d_out, torch.zeros(shape, dtype=dtype, device=device)
