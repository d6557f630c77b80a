"""Decays inside a chunk of L tokens.

Every exponent here is a sum of log decays: never positive, so nothing overflows,
and never a difference of long sums, so nothing cancels.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def segment_sums(log_decay: Float[Tensor, "*S L"]) -> Float[Tensor, "*S L L"]:
    """Entry (t, i) is the sum of log_decay_j over i < j <= t; -inf where i > t."""
    L = log_decay.shape[-1]
    lower = torch.ones(L, L, dtype=torch.bool, device=log_decay.device).tril()
    steps = log_decay[..., None].expand(*log_decay.shape, L)
    sums = steps.masked_fill(~lower.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower, float("-inf"))


def sums_to_end(log_decay: Float[Tensor, "*S L K"]) -> Float[Tensor, "*S L K"]:
    """At i, the sum over the tokens after i."""
    return F.pad(log_decay[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def decayed_scores(
    rows: Float[Tensor, "*R L K"],
    columns: Float[Tensor, "*C L K"],
    log_decay: Float[Tensor, "*D L K"],
    exclusive: bool = False,
) -> tuple[Float[Tensor, "*S L L"], Float[Tensor, "*D L K"]]:
    """A_ti = sum_c rows_tc columns_ic exp(sum of log_decay_jc over i < j <= t) for i <= t.

    With `exclusive` the sum stops at j < t, and A at i < t: the state that a
    token meets, before its own decay and key. Also returns the sum from the
    chunk's first token to t (t - 1). L is a power of two.

    A decay a channel does not factor out of the product, and exp(G_t) exp(-G_i)
    overflows. Between the halves of a block it factors at the border with both
    exponents negative; blocks double until one is the chunk: log2(L) products.
    """
    scores = (rows * columns).sum(-1)[..., None, None]
    before, after, total = log_decay, torch.zeros_like(log_decay), log_decay
    if exclusive:
        scores, before = torch.zeros_like(scores), torch.zeros_like(before)
    size = 1
    while size < rows.shape[-2]:
        halves = (-1, 2, size)
        before, after = before.unflatten(-2, halves), after.unflatten(-2, halves)
        late = rows.unflatten(-2, halves)[..., 1, :, :] * before[..., 1, :, :].exp()
        early = columns.unflatten(-2, halves)[..., 0, :, :] * after[..., 0, :, :].exp()
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)
        upper = F.pad(first, (0, size))
        scores = torch.cat([upper, torch.cat([late @ early.mT, second], -1)], -2)
        lead, tail = total.unflatten(-2, (-1, 2))[..., None, :].unbind(-3)
        before = torch.cat([before[..., 0, :, :], before[..., 1, :, :] + lead], -2).flatten(-3, -2)
        after = torch.cat([after[..., 0, :, :] + tail, after[..., 1, :, :]], -2).flatten(-3, -2)
        total = (lead + tail)[..., 0, :]
        size *= 2
    return scores[..., 0, :, :], before
