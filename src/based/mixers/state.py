"""The state of one layer: an object of named tensors, batch axis first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


class State(dict[str, Tensor]):
    """Named tensors whose first axis is the sequence; what a layer remembers, whole.

    The same object is the cache of a generation, a row of an engine's pool, and
    what a snapshot stores. `Mixer.step` changes it in place.
    """

    #: Tokens that may be stepped before a state that grows must look at its lengths again
    #: (which waits for a GPU); infinite where it must never grow.
    room: float = 0

    @property
    def batch_size(self) -> int:
        """Number of sequences (rows)."""
        return next(iter(self.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, all rows."""
        return sum(tensor.nbytes for tensor in self.values())

    def select(self, rows: Int[Tensor, " R"]) -> State:
        """A copy of the given rows, in that order (repeats allowed)."""
        return State({name: tensor.index_select(0, rows) for name, tensor in self.items()})

    def assign(self, rows: Int[Tensor, " R"], other: State) -> None:
        """Overwrites the given rows with those of `other`, in place."""
        for name, tensor in self.items():
            tensor.index_copy_(0, rows, other[name].to(tensor.dtype))

    def reset(self, rows: Int[Tensor, " R"]) -> None:
        """Returns the given rows to the state before the first token (all zeros), in place."""
        for tensor in self.values():
            tensor.index_fill_(0, rows, 0)

    def narrow(self, first: int, count: int) -> State:
        """A view of `count` rows from `first` on; what changes one changes the other."""
        view = State({name: tensor.narrow(0, first, count) for name, tensor in self.items()})
        view.room = self.room
        return view

    def clone(self) -> State:
        """A copy that shares no memory."""
        return State({name: tensor.clone() for name, tensor in self.items()})

    def detach(self) -> State:
        """The same tensors, cut from the autograd graph."""
        return State({name: tensor.detach() for name, tensor in self.items()})

    def to(self, device: torch.device | str) -> State:
        """On another device; dtypes stay."""
        return State({name: tensor.to(device) for name, tensor in self.items()})

    @staticmethod
    def concatenate(states: Sequence[State]) -> State:
        """Rows of all states, in order."""
        return State({name: torch.cat([state[name] for state in states]) for name in states[0]})
