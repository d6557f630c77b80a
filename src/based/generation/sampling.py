"""How the next token is chosen from the logits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from based.errors import BasedError


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

    def generator(self, device: torch.device) -> torch.Generator:
        """A random generator at the request's seed."""
        return torch.Generator(device).manual_seed(self.seed)


def sample(
    logits: Float[Tensor, " V"], sampling: Sampling, generator: torch.Generator
) -> Int[Tensor, ""]:
    """Draws one token id."""
    if sampling.temperature == 0:
        return logits.argmax()
    logits = logits.double() / sampling.temperature
    logits, ids = logits.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        logits, ids = logits[: sampling.top_k], ids[: sampling.top_k]
    probabilities = logits.softmax(dim=-1)
    # A token stays if those before it do not reach top_p: the first always does.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.where(before < sampling.top_p, 0)
    return ids[torch.multinomial(probabilities, 1, generator=generator)[0]]
