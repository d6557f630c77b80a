"""Multi-query associative recall: key-value pairs, then each key once more as a query."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from based.errors import BasedError

IGNORE = -100
# Rows drawn at a time, so that the draws of a large segment stay in cache.
ROWS = 4096


class Task(NamedTuple):
    """One segment of the data: `examples` sequences of one length and number of pairs."""

    length: int
    pairs: int
    examples: int


class Segment(NamedTuple):
    """Examples of one task, their queries by position: what a model must answer, and where."""

    tokens: Int[Tensor, "N T"]
    positions: Int[Tensor, "N D"]
    answers: Int[Tensor, "N D"]

    def to(self, device: torch.device) -> "Segment":
        """On another device."""
        return Segment(*(tensor.to(device) for tensor in self))

    def batches(self, size: int) -> Iterator["Segment"]:
        """Consecutive pieces of `size` examples; the last may be smaller."""
        for first in range(0, len(self.tokens), size):
            yield Segment(*(tensor[first : first + size] for tensor in self))


def segment(task: Task, vocab_size: int = 8192, *, seed: int, power: float = 0.01) -> Segment:
    """The examples of a task, drawn from a seed: tokens, positions and answers as int32.

    Keys come from the lower half of the vocabulary (0 is none) and values from
    the upper, without replacement within an example. The first 2 * pairs tokens
    are k1 v1 k2 v2 ...; then every key stands once more, at an even slot drawn
    without replacement with probability proportional to (slot + 1)^(power - 1),
    and is to be answered with its value. All other tokens are random ones of the
    whole vocabulary (Zoology, section 3.1 and its generator).
    """
    check_task(task, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(ROWS, task.examples - first) for first in range(0, task.examples, ROWS)]
    parts = [_draw(rows, task, vocab_size, power, generator) for rows in sizes]
    return Segment(*(torch.cat(tensors).int() for tensors in zip(*parts, strict=True)))


def mqar(
    examples: int,
    length: int,
    pairs: int,
    vocab_size: int = 8192,
    *,
    power: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Examples of `segment`'s distribution as inputs and labels; labels are -100 but at queries."""
    task = Task(length, pairs, examples)
    check_task(task, vocab_size)
    inputs, positions, answers = _draw(examples, task, vocab_size, power, generator)
    labels = torch.full_like(inputs, IGNORE).scatter_(1, positions, answers)
    return inputs, labels


def check_task(task: Task, vocab_size: int) -> None:
    """Refuses a task that cannot be, in one line."""
    if 4 * task.pairs > task.length:
        raise BasedError(
            f"{task.pairs} pairs do not fit {task.length} tokens; 4 x pairs must be at most that"
        )
    if task.pairs > vocab_size // 2 - 1:
        raise BasedError(f"{task.pairs} pairs need a vocabulary of at least {2 * task.pairs + 2}")


def _draw(
    rows: int, task: Task, vocab_size: int, power: float, generator: torch.Generator | None
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B D"], Int[Tensor, "B D"]]:
    half, context = vocab_size // 2, 2 * task.pairs
    keys = 1 + _distinct(half - 1, rows, task.pairs, generator)
    values = half + _distinct(vocab_size - half, rows, task.pairs, generator)
    slots = torch.arange(1, (task.length - context) // 2 + 1, dtype=torch.float64)
    positions = context + 2 * _weighted(slots ** (power - 1), rows, task.pairs, generator)
    tokens = torch.randint(vocab_size, (rows, task.length), generator=generator)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    return tokens.scatter_(1, positions, keys), positions, values


def _distinct(
    choices: int, rows: int, count: int, generator: torch.Generator | None
) -> Int[Tensor, "B D"]:
    """`count` of the numbers below `choices` a row, one after the other without replacement.

    A row is the first `count` different numbers of a random stream, which is what
    drawing again on every repetition gives.
    """
    stream = torch.empty(rows, 0, dtype=torch.long)
    while True:
        more = torch.randint(choices, (rows, count + count // 4 + 4), generator=generator)
        stream = torch.cat([stream, more], dim=1)
        # Stable, so that of equal numbers the first in the stream comes first.
        ordered, place = stream.sort(dim=1, stable=True)
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        first = torch.empty_like(repeated).scatter_(1, place, ~repeated)
        wanted = first & (first.cumsum(1) <= count)
        if bool((wanted.sum(1) == count).all()):
            return stream[wanted].reshape(rows, count)


def _weighted(
    weights: Tensor, rows: int, count: int, generator: torch.Generator | None
) -> Int[Tensor, "B D"]:
    """Draws `count` indices a row, one after the other without replacement, by weight.

    The order of weights perturbed by Gumbel noise is that of sequential draws.
    """
    uniform = torch.rand(rows, len(weights), generator=generator, dtype=torch.float64)
    perturbed = weights.log() - (-uniform.clamp(min=1e-300).log()).log()
    return perturbed.topk(count, dim=1).indices
