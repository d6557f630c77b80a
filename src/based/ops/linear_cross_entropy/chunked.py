"""Cross-entropy of a linear head in chunks of tokens: memory of one chunk's logits.

The forward pass knows the loss to be a sum, so it leaves the gradients of hidden
states and weight behind and drops each chunk's logits; the backward pass only scales.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from based.ops.precision import without_autocast

# Logits of one chunk, in elements: a gigabyte in bfloat16. The gradient of the weight is
# added up once a chunk, so small ones cost time.
CHUNK_ELEMENTS = 1 << 29


@without_autocast
def linear_cross_entropy(
    hidden: Float[Tensor, "T C"], weight: Float[Tensor, "W C"], targets: Int[Tensor, " T"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " T"]]:
    """Sum of the tokens' losses (nats), and each token's loss, which carries no gradient.

    Both are float32 (float64 for float64 inputs), whatever the dtype of the logits.
    """
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, wanted)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wanted else None
        # A power of two, so that chunks of a usual batch are of one shape.
        count = 1 << (max(1, CHUNK_ELEMENTS // len(weight)).bit_length() - 1)
        for first in range(0, len(hidden), count):
            part = slice(first, first + count)
            logits = hidden[part] @ weight.T
            losses[part], d_logits = _softmax(logits.is_cuda)(logits, targets[part], wanted)
            if d_hidden is not None and d_weight is not None:
                d_hidden[part] = d_logits @ weight
                d_weight += d_logits.T @ hidden[part]
        if d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_sum: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_sum.to(d_hidden.dtype), d_weight * d_sum.to(d_weight.dtype), None, None


def _losses(
    logits: Float[Tensor, "T W"], targets: Int[Tensor, " T"], wanted: bool
) -> tuple[Float[Tensor, " T"], Float[Tensor, "T W"]]:
    """Each token's loss, and (if wanted) the gradient of their sum: softmax minus one-hot."""
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    normaliser = wide.logsumexp(-1, keepdim=True)
    losses = normaliser - wide.gather(1, targets[:, None])
    if not wanted:
        return losses[:, 0], logits
    gradient = (wide - normaliser).exp_().to(logits.dtype)
    # The target's p - 1 from its loss, after the rounding: the rest is one pass when compiled.
    gradient.scatter_(1, targets[:, None], torch.expm1(-losses).to(logits.dtype))
    return losses[:, 0], gradient


@lru_cache(maxsize=2)
def _softmax(fused: bool) -> Any:
    """`_losses`, compiled on a GPU: read and written once instead of ten times."""
    return torch.compile(_losses) if fused else _losses
