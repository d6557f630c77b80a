"""Perplexity on recall hits and on the rest (paper section 3.1, after Zoology section 2).

A recall hit is a token whose bigram with the token before it stood earlier in the
same window: a model that looks the bigram up in its context can predict it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from based.data import Windows
from based.errors import BasedError
from based.models import Decoder
from based.models.device import to_device

GROUPS = ("all", "hits", "rest")


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log-likelihood (nats) and token counts of each window.

    Both are [windows, 2], the columns recall hits and the rest, float64.
    """

    nll: Float[Tensor, "W 2"]
    tokens: Float[Tensor, "W 2"]

    def loss(self, group: str = "all") -> float:
        """Nats a token; NaN where there are no tokens."""
        nll, tokens = self.of(group)
        return (nll.sum() / tokens.sum()).item()

    def perplexity(self, group: str = "all") -> float:
        """exp of the loss."""
        return math.exp(min(self.loss(group), 700.0))

    def standard_error(self, group: str = "all") -> float:
        """Of the loss, over windows."""
        return _ratio_error(*self.of(group))

    def share(self, group: str) -> float:
        """Share of all tokens that are in the group."""
        return (self.of(group)[1].sum() / self.tokens.sum()).item()

    def of(self, group: str) -> tuple[Float[Tensor, " W"], Float[Tensor, " W"]]:
        """Per window: summed negative log-likelihood and tokens of "all", "hits" or "rest"."""
        if group == "all":
            return self.nll.sum(1), self.tokens.sum(1)
        column = GROUPS.index(group) - 1
        return self.nll[:, column], self.tokens[:, column]

    def as_dict(self) -> dict[str, float]:
        """Losses, perplexities and shares, for a results row."""
        row = {}
        for group in GROUPS:
            row[f"loss_{group}"] = self.loss(group)
            row[f"perplexity_{group}"] = self.perplexity(group)
            row[f"standard_error_{group}"] = self.standard_error(group)
        return {**row, "share_hits": self.share("hits"), "tokens": int(self.tokens.sum())}


@dataclass(frozen=True)
class Difference:
    """Loss of one model minus another's over the same windows, in nats a token."""

    mean: float
    standard_error: float

    @property
    def within_noise(self) -> bool:
        """Whether it is below two standard errors, so that either may be the better one."""
        return not abs(self.mean) > 2 * self.standard_error


def paired_difference(a: Perplexity, b: Perplexity, group: str = "all") -> Difference:
    """How much more model a loses than model b; the error counts windows, not training seeds."""
    if not torch.equal(a.tokens, b.tokens):
        raise BasedError("the two evaluations are not of the same windows")
    (nll_a, tokens), (nll_b, _) = a.of(group), b.of(group)
    difference = nll_a - nll_b
    mean = (difference.sum() / tokens.sum()).item()
    return Difference(mean, _ratio_error(difference, tokens))


def recall_hits(tokens: Int[Tensor, "B T"], vocab_size: int) -> Bool[Tensor, "B T-1"]:
    """For each token but the first: whether its bigram stands earlier in its row."""
    bigrams = tokens[:, :-1].long() * vocab_size + tokens[:, 1:]
    ordered, order = bigrams.sort(dim=1, stable=True)
    repeated = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.zeros_like(repeated).scatter(1, order, repeated)


class Share(NamedTuple):
    """What one of several ranks evaluates: every `ranks`-th batch, some columns of each window."""

    rank: int = 0
    ranks: int = 1
    columns: slice = slice(None)


WHOLE = Share()


@torch.no_grad()
def evaluate(
    model: Decoder,
    windows: Windows,
    batch_size: int = 8,
    max_windows: int | None = None,
    on_windows: Callable[[int], None] = lambda count: None,
    share: Share = WHOLE,
) -> Perplexity:
    """Evaluates consecutive windows of the text; `on_windows` reports how many more are done.

    With a `share` the result is zero where other ranks' is not: their sum is the
    whole. All ranks run the model equally often, as sharded weights require.
    """
    count = min(windows.count, max_windows or windows.count)
    nll, tokens = torch.zeros(2, count, 2, dtype=torch.float64)
    training = model.training
    model.eval()
    size = min(batch_size, count)
    for first in range(0, count, size * share.ranks):
        start = first + size * share.rank
        # A last batch that would be short begins earlier: all are of one shape.
        begin = min(start, count - size)
        batch = to_device(windows.in_order(begin, size), model.device)
        inputs, targets = (part[:, share.columns] for part in (batch[:, :-1], batch[:, 1:]))
        _, losses, _ = model.loss(inputs, targets)
        hits = recall_hits(batch, model.config.vocab_size)[:, share.columns]
        groups = torch.stack([hits, ~hits], dim=-1).double()
        if start < count:
            rows = slice(start, begin + size)
            nll[rows] = (losses.double()[..., None] * groups).sum(1)[start - begin :].cpu()
            tokens[rows] = groups.sum(1)[start - begin :].cpu()
        on_windows(min(size * share.ranks, count - first))
    model.train(training)
    return Perplexity(nll, tokens)


def _ratio_error(sums: Float[Tensor, " W"], counts: Float[Tensor, " W"]) -> float:
    """Standard error of sum(sums) / sum(counts) over independent windows (delta method)."""
    windows = len(sums)
    if windows < 2 or counts.sum() == 0:
        return math.nan
    residuals = sums - sums.sum() / counts.sum() * counts
    return (residuals.square().sum() * windows / (windows - 1)).sqrt().item() / counts.sum().item()
