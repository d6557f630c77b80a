"""Multi-query associative recall: key-value pairs, then each key once more as a query."""

import torch
from jaxtyping import Int
from torch import Tensor

from based.errors import BasedError

IGNORE = -100


def mqar(
    examples: int,
    length: int,
    pairs: int,
    vocab_size: int = 8192,
    *,
    power: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and labels of the published task (Zoology, section 3.1 and its generator).

    Keys come from the lower half of the vocabulary (0 is none) and values from
    the upper, without replacement within an example. The first 2 * pairs tokens
    are k1 v1 k2 v2 ...; then every key stands once more, at an even slot drawn
    without replacement with probability proportional to (slot + 1)^(power - 1),
    and is labelled with its value. All other labels are -100, and all other
    tokens are random ones of the whole vocabulary.
    """
    if 4 * pairs > length:
        raise BasedError(
            f"{pairs} pairs do not fit {length} tokens; 4 x pairs must be at most that"
        )
    if pairs > vocab_size // 2 - 1:
        raise BasedError(f"{pairs} pairs need a vocabulary of at least {2 * pairs + 2}")
    half, context = vocab_size // 2, 2 * pairs
    keys = 1 + _distinct(torch.ones(half - 1), examples, pairs, generator)
    values = half + _distinct(torch.ones(vocab_size - half), examples, pairs, generator)
    slots = torch.arange(1, (length - context) // 2 + 1, dtype=torch.float64)
    queries = context + 2 * _distinct(slots ** (power - 1), examples, pairs, generator)

    inputs = torch.randint(vocab_size, (examples, length), generator=generator)
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
    inputs.scatter_(1, queries, keys)
    labels = torch.full_like(inputs, IGNORE).scatter_(1, queries, values)
    return inputs, labels


def _distinct(
    weights: Tensor, rows: int, count: int, generator: torch.Generator | None
) -> Int[Tensor, "B N"]:
    """Draws `count` indices a row, one after the other without replacement, by weight.

    The order of weights perturbed by Gumbel noise is that of sequential draws.
    """
    uniform = torch.rand(rows, len(weights), generator=generator, dtype=torch.float64)
    perturbed = weights.double().log() - (-uniform.clamp(min=1e-300).log()).log()
    return perturbed.topk(count, dim=1).indices
