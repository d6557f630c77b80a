"""One request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from based.errors import BasedError
from based.generation.sampling import Sampling
from based.generation.text import TextStream
from based.models import DecoderState

FinishReason = Literal["stop", "length", "cancelled", "unread", "error"]


class Snapshot(NamedTuple):
    """What a sequence had been at some token: enough to go on from there, any number of times."""

    state: DecoderState
    """One row, canonical: everything up to the pending tokens."""
    pending: tuple[int, ...]
    """Tokens that belong to the sequence and are not in the state yet."""
    length: int
    """Tokens that the state has seen."""


@dataclass(eq=False)
class Generation:
    """What was asked for, and what has come back so far.

    `finish_reason` is None while the engine works on it. "stop" is the end-of-text
    token or a stop string, "length" `max_new_tokens`; "unread" means that its caller
    left more than `max_unread` tokens waiting; "error" is explained in `error`.
    """

    prompt: list[int]
    sampling: Sampling
    eos_id: int | None = None
    text: TextStream | None = None
    max_unread: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of each token, under the model's distribution before temperature and cuts."""
    finish_reason: FinishReason | None = None
    error: str = ""
    drawn: int = 0
    """Draws that the device was asked for; one may be on its way."""
    fed: int = 0
    """Prompt tokens that the state has."""
    seen: int = 0
    """Tokens before the prompt that the state began with."""
    carry: DecoderState | None = None
    """The state while it is not in the pool: between two chunks of the prompt."""
    parked: bool = False
    """Whether `carry` is a row of the pool that was put aside, ready to decode."""
    _read: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def take(self) -> list[int]:
        """The tokens that have come since the last call."""
        fresh = self.tokens[self._read :]
        self._read = len(self.tokens)
        return fresh

    def accept(self, token: int, logprob: float) -> None:
        """Takes a drawn token; finishes where it, or its text, ends the sequence."""
        if logprob != logprob:
            self.finish("error", "the model's logits are not finite")
        elif token == self.eos_id:
            self.finish("stop")
        else:
            self._append(token, logprob)

    def _append(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.text is not None and self.text.feed(token):
            self.finish("stop")
        elif len(self.tokens) == self.sampling.max_new_tokens:
            self.finish("length")
        elif self.max_unread is not None and len(self.tokens) - self._read > self.max_unread:
            self.finish("unread")

    def finish(self, reason: FinishReason, error: str = "") -> None:
        """Nothing more will come."""
        self.finish_reason, self.error, self.carry = reason, error, None
        if self.text is not None:
            self.text.finish()

    def raise_error(self) -> None:
        """Raises what went wrong, if anything did."""
        if self.finish_reason == "error":
            raise BasedError(f"the generation ended early: {self.error}")
