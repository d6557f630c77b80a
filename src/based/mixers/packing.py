"""Packing and padding, once for all mixers.

A padded batch becomes a packed one where the model begins (`Packing`), so that
mixers, norms and MLPs never meet a padding token; a mixer without a packed form
of its own runs sequence by sequence (`mix_each_sequence`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

if TYPE_CHECKING:
    from based.mixers.base import Mixer
    from based.mixers.state import State


class Packing(NamedTuple):
    """How a padded batch was packed: slots of the real tokens, and their boundaries."""

    slots: Int[Tensor, " T"]
    cu_seqlens: Int[Tensor, " E"]
    shape: tuple[int, int]

    @staticmethod
    def of(mask: Bool[Tensor, "B T"]) -> Packing:
        """From a mask that is true on real tokens, wherever in a row they stand."""
        lengths = mask.sum(dim=1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Packing(mask.flatten().nonzero()[:, 0], cu_seqlens, (mask.shape[0], mask.shape[1]))

    def pack(self, x: Shaped[Tensor, "B L ..."]) -> Shaped[Tensor, "1 T ..."]:
        """The real tokens of all rows, end to end."""
        return x.flatten(0, 1)[self.slots][None]

    def unpack(self, x: Shaped[Tensor, "1 T ..."]) -> Shaped[Tensor, "B L ..."]:
        """Back in their places, zeros on padding."""
        out = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return out.index_copy(0, self.slots, x[0]).unflatten(0, self.shape)


def mix_each_sequence(
    mixer: Mixer, x: Tensor, cu_seqlens: Tensor, state: State | None
) -> tuple[Tensor, State | None]:
    """Runs the parallel form on each packed sequence; equal lengths go together."""
    bounds = cu_seqlens.tolist()
    by_length: dict[int, list[int]] = {}
    for row, (start, end) in enumerate(pairwise(bounds)):
        by_length.setdefault(end - start, []).append(row)
    pieces: dict[int, Tensor] = {}
    states: list[State] = []
    for length, rows in by_length.items():
        before = None if state is None else state.select(torch.tensor(rows, device=x.device))
        if length == 0:
            y, after = x.new_zeros(len(rows), 0, x.shape[2]), before
        else:
            y, after = mixer.mix(torch.cat([x[:, bounds[r] : bounds[r + 1]] for r in rows]), before)
        pieces |= zip(rows, y.unbind(), strict=True)
        if after is not None:
            states.append(after)
    out = torch.cat([pieces[row] for row in range(len(pieces))])[None]
    if not states:
        return out, None
    joined, order = mixer.join_states(states), torch.tensor(list(pieces))
    return out, joined if len(states) == 1 else joined.select(order.argsort().to(x.device))
