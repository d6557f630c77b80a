"""The mathematics, with all logits in memory. The chunked path is tested against this."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def stacked_cross_entropy_reference(
    hidden: Float[Tensor, "M Q C"], head: Float[Tensor, "M V C"], answers: Int[Tensor, " Q"]
) -> Float[Tensor, " M"]:
    """Mean over Q of -log softmax(head hidden_q)[answers_q], a model m at a time."""
    logits = torch.einsum("mqc,mvc->mqv", hidden, head)
    index = answers.long().expand(len(hidden), -1)[..., None]
    return -logits.log_softmax(-1).gather(-1, index)[..., 0].mean(-1)
