"""The mathematics, with a full sort. Every fast path is tested against this."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.token_sampling.philox import uniform


def sample_tokens_reference(
    logits: Float[Tensor, "B V"],
    temperature: Float[Tensor, " B"],
    top_k: Int[Tensor, " B"],
    top_p: Float[Tensor, " B"],
    seed: Int[Tensor, " B"],
    position: Int[Tensor, " B"],
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token id a row, and its log-probability under the logits as they are given.

    Temperature 0 takes the largest logit. Otherwise softmax(logits / temperature)
    is cut to the `top_k` most likely tokens, of those to the most likely that
    together reach `top_p` of what is left (ties: the lower id), and the token is
    where the cut distribution, summed in order of ids, passes draw `position` of
    `seed`. A row that is not finite gives token 0 and NaN.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    finite = logits.isfinite().all(-1)
    logits = logits.where(finite[:, None], 0)
    scaled = logits / temperature.where(temperature > 0, 1)[:, None].to(logits.dtype)
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    weights = (ordered - ordered[:, :1]).exp().where(rank < top_k[:, None], 0)
    # A token stays if those before it do not reach top_p: the first always does.
    before = weights.cumsum(-1) - weights
    weights = weights.where(before < top_p[:, None] * weights.sum(-1, keepdim=True), 0)
    in_order = torch.zeros_like(weights).scatter(1, ids, weights)
    reached = in_order.cumsum(-1)
    target = uniform(seed, position).to(reached.dtype) * reached[:, -1]
    last = (in_order > 0).int().mul(rank).amax(-1)
    drawn = torch.minimum((reached <= target[:, None]).sum(-1), last)
    token = torch.where(temperature > 0, drawn, ids[:, 0]).where(finite, 0)
    logprob = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    return token, logprob.where(finite, torch.nan)
