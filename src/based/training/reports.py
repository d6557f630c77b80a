"""What a run tells of itself, and to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from based.evaluation import Perplexity


@dataclass(frozen=True)
class Step:
    """What is known after a step."""

    step: int
    tokens: int
    """Of all steps so far."""
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    """Of all ranks together."""
    peak_share: float | None = None
    """Model flops as a share of what the ranks can do; None where that is not known."""
    memory_bytes: int | None = None
    """Most that this rank's GPU has held; None on a CPU."""


@runtime_checkable
class Reporter(Protocol):
    """Is told what happens; the command shows it, a test records it."""

    def on_step(self, step: Step) -> None:
        """After every step."""

    def on_evaluation(self, step: int, result: Perplexity) -> None:
        """After every evaluation."""

    def on_message(self, text: str) -> None:
        """A thing worth a line: resumed, a damaged checkpoint, saved."""
