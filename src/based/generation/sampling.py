"""How the next token is chosen from the logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from based.errors import BasedError
from based.models.device import to_device
from based.ops.token_sampling import SamplingRows


@dataclass(frozen=True)
class Sampling:
    """Sampling options of one request; temperature 0 is greedy."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this probability."""
    seed: int = 0
    """The same seed, prompt and model give the same tokens."""
    max_new_tokens: int = 200
    """Generate at most this many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""

    def __post_init__(self) -> None:
        """Refuses what cannot be sampled from."""
        if not self.temperature >= 0:
            raise BasedError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise BasedError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise BasedError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise BasedError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if "" in self.stop:
            raise BasedError("a stop string is empty; it would end every text at once")


def sampling_rows(
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    vocab_size: int,
    device: torch.device,
) -> SamplingRows:
    """The options of several requests, a row each; row i is at draw positions[i] of its seed."""
    # Seeds are taken modulo 2^64, as a signed integer stores them.
    seeds = [(s.seed + 2**63) % 2**64 - 2**63 for s in samplings]
    columns = (
        torch.tensor([s.temperature for s in samplings], dtype=torch.float32),
        torch.tensor([s.top_k or vocab_size for s in samplings]),
        torch.tensor([s.top_p for s in samplings], dtype=torch.float32),
        torch.tensor(seeds),
        torch.tensor(list(positions)),
    )
    return SamplingRows(*(to_device(column, device) for column in columns))
