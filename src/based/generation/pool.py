"""The engine's memory: a fixed number of slots, one allocation of the mixers' own state.

A slot is a row of a `DecoderState`. Rows in use are kept towards the front, so that
a decode step is a step over the first rows; a row that is free holds leftovers,
which `load` overwrites whole.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from based.errors import BasedError
from based.generation.sampling import to_device
from based.mixers import State
from based.models import Decoder, DecoderState


class StatePool:
    """`slots` rows of the model's state, each with room for `length` tokens where states grow.

    With a spare row, number `slots`, what is loaded there is lost.
    """

    def __init__(
        self, model: Decoder, slots: int, length: int, recent: int = 0, *, spare: bool = False
    ) -> None:
        self.slots, self._model, self._length = slots, model, length
        try:
            self.state = model.init_state(slots + spare, length, recent)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            needed = slots * slot_bytes(model, length, recent)
            raise BasedError(
                f"{slots} slots need {needed / 1e9:.1f} GB of memory for their states; "
                f"ask for fewer slots ({str(error).splitlines()[0]})"
            ) from error
        for layer in self.state:
            layer.room = math.inf
        self._free = list(range(slots))

    @property
    def free(self) -> int:
        """Slots that no sequence has."""
        return len(self._free)

    def acquire(self) -> int:
        """Takes the first free row."""
        return heapq.heappop(self._free)

    def release(self, row: int) -> None:
        """Gives a row back; it keeps its contents until it is loaded."""
        assert row not in self._free
        heapq.heappush(self._free, row)

    def load(self, rows: Sequence[int], states: DecoderState) -> None:
        """Overwrites all of the given rows by those of `states`, canonical or as `read` gave it.

        States that grow may have less room there: what is beyond becomes zeros.
        """
        self.load_at(to_device(torch.tensor(list(rows)), self._model.device), states)

    def load_at(self, index: Int[Tensor, " N"], states: DecoderState) -> None:
        """As `load`, of rows that the device knows of."""
        for mixer, layer, given in zip(self._model.mixers(), self.state, states, strict=True):
            if not layer.keys() <= given.keys():
                given = mixer.defer(given)
            for name, tensor in layer.items():
                if name not in given:
                    tensor.index_fill_(0, index, 0)
                    continue
                source = given[name].to(tensor)
                if source.dim() > 1 and (beyond := tensor.shape[1] - source.shape[1]):
                    tensor.narrow(1, source.shape[1], beyond).index_fill_(0, index, 0)
                    tensor = tensor.narrow(1, 0, source.shape[1])
                tensor.index_copy_(0, index, source)

    def move(self, source: int, target: int) -> None:
        """Copies a row to the free row `target`, whose place it takes."""
        self._free.remove(target)
        heapq.heapify(self._free)
        tensors = [tensor for layer in self.state for tensor in layer.values()]
        torch._foreach_copy_([t[target] for t in tensors], [t[source] for t in tensors])
        self.release(source)

    def read(self, row: int) -> DecoderState:
        """A copy of a row, as it is stored."""
        return self.state.narrow(row, 1).clone()

    def canonical(self, row: int) -> DecoderState:
        """A copy of a row as the mixers themselves would hold it."""
        stored, settled = self.read(row), []
        for mixer, layer in zip(self._model.mixers(), stored, strict=True):
            mixer.settle(layer)
            spec = mixer.state_spec(self._length, self._model.dtype)
            settled.append(State({name: layer[name] for name in spec}))
        return DecoderState(settled)

    def wipe(self) -> None:
        """Zeroes every row."""
        for layer in self.state:
            for tensor in layer.values():
                tensor.zero_()


def slot_bytes(model: Decoder, length: int, recent: int = 0) -> int:
    """Bytes of one slot."""
    return sum(
        math.prod(spec.shape) * (spec.dtype or model.dtype).itemsize
        for mixer in model.mixers()
        for spec in mixer.decode_spec(length, model.dtype, recent).values()
    )
