"""Logits to losses and to their gradient, in place: one read and one write of each logit."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def softmax_gradient_(
    logits: Float[Tensor, "M Q V"], answers: Int[Tensor, " Q"], scale: float
) -> Float[Tensor, " M"]:
    """Replaces logits by (softmax - one_hot(answer)) * scale; returns each model's summed loss."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from based.ops.stacked_cross_entropy.triton import softmax_gradient_kernel_

        return softmax_gradient_kernel_(logits, answers, scale)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits.to(wide)
    normaliser = x.logsumexp(-1, keepdim=True)
    index = answers.long().expand(len(x), -1)[..., None]
    losses = normaliser - x.gather(-1, index)
    x = (x - normaliser).exp_()
    x.scatter_add_(-1, index, x.new_full((), -1.0).expand_as(index)).mul_(scale)
    logits.copy_(x)
    return losses[..., 0].sum(-1)
