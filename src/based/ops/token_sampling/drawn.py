"""What is drawn, and its way to the host without a copy between two steps."""

import weakref
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int32, Int64
from torch import Tensor


@dataclass(frozen=True)
class Drawn:
    """A token id a row, and its log-probability: NaN where the logits were not finite.

    Both are views of `bits`, which one copy takes to the host.
    """

    bits: Int64[Tensor, "2 B"]

    @staticmethod
    def empty(rows: int, device: torch.device) -> "Drawn":
        """Room for so many rows."""
        return Drawn(torch.zeros(2, rows, dtype=torch.long, device=device))

    @property
    def tokens(self) -> Int64[Tensor, " B"]:
        """Ids."""
        return self.bits[0]

    @property
    def logprobs(self) -> Float64[Tensor, " B"]:
        """Natural logarithms."""
        return self.bits[1].view(torch.float64)

    def first(self, rows: int) -> "Drawn":
        """Views of the first rows."""
        return Drawn(self.bits[:, :rows])

    def to_host(self) -> "Drawn":
        """A copy on the host; of a GPU's it is there only when the stream has come so far."""
        if not self.bits.is_cuda:
            return Drawn(self.bits.clone())
        pinned = torch.empty(self.bits.shape, dtype=self.bits.dtype, pin_memory=True)
        return Drawn(pinned.copy_(self.bits, non_blocking=True))


# Host memory of outboxes that are gone, by rows and kind of device. None but an outbox gets it:
# a step may still be writing there.
_spare: dict[tuple[int, str], list[Tensor]] = {}


class Outbox:
    """Host memory in which the sampling kernel leaves what it draws, in two places by turns.

    So one place is read while the next step writes the other; the step after that writes the
    first again. A captured step remembers nothing, so whose turn it is stands on the device too.
    """

    bits: Int64[Tensor, "2 2 B"]
    """Of each place, as `Drawn` has them."""
    turns: Int32[Tensor, " B"]
    """The place of the next step, a copy for each row's program."""

    def __init__(self, rows: int, device: torch.device) -> None:
        spare, pinned = _spare.setdefault((rows, device.type), []), device.type == "cuda"
        try:
            self.bits = spare.pop()
        except IndexError:
            self.bits = torch.zeros(2, 2, rows, dtype=torch.long, pin_memory=pinned)
        weakref.finalize(self, spare.append, self.bits).atexit = False
        self.turns = torch.zeros(rows, dtype=torch.int32, device=device)
        self._turn = 0

    def restart(self) -> None:
        """After steps that were not counted."""
        self.turns.zero_()
        self._turn = 0

    def count_step(self) -> None:
        """The device has been given a step."""
        self._turn = 1 - self._turn

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and log-probabilities of the first place, and turns, as a kernel takes them."""
        first = Drawn(self.bits[0])
        return first.tokens, first.logprobs, self.turns

    def last(self) -> Drawn:
        """What the step counted last draws: there when the device has come so far."""
        return Drawn(self.bits[1 - self._turn])
