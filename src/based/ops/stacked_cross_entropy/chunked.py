"""Loss and gradients in one pass over chunks of queries.

The gradient of the mean loss is known as soon as the logits are: a chunk's logits
become their own gradient in place, meet both products, and are gone. No more
logits than a chunk's are ever kept.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from based.ops.stacked_cross_entropy.gradient import softmax_gradient_

# Logits in memory at a time: what stays in a CPU's cache, and on a GPU enough queries to
# spread the sums over the vocabulary, whose results are small, over all of it.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}


def stacked_cross_entropy(
    hidden: Float[Tensor, "M Q C"],
    head: Float[Tensor, "M V C"],
    answers: Int[Tensor, " Q"],
    products: torch.dtype | None = None,
) -> Float[Tensor, " M"]:
    """Mean cross-entropy of M models on the same queries, as `reference.py` defines it.

    `products` is the dtype of the matrix products and of the logits in memory
    (that of `hidden` if None); sums are float32, or float64 for float64 inputs.
    """
    return _StackedCrossEntropy.apply(hidden, head, answers, products or hidden.dtype)


@torch.library.custom_op("based::stacked_cross_entropy", mutates_args=())
def _with_gradients(
    hidden: Tensor, head: Tensor, answers: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [M], and their gradients for hidden and head; opaque to `torch.compile`."""
    models, queries, _ = hidden.shape
    size = max(1, CHUNK_ELEMENTS["cuda" if hidden.is_cuda else "cpu"] // (models * head.shape[1]))
    weight = head.to(products)
    total = hidden.new_zeros(models)
    d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
    for first in range(0, queries, size):
        part = slice(first, first + size)
        x = hidden[:, part].to(products)
        logits = x @ weight.mT
        total += softmax_gradient_(logits, answers[part], 1 / queries)
        d_hidden[:, part] = logits @ weight
        if products == head.dtype:
            d_head.baddbmm_(logits.mT, x)
        else:
            d_head += logits.mT @ x
    return total / queries, d_hidden, d_head


@_with_gradients.register_fake
def _with_gradients_fake(
    hidden: Tensor, head: Tensor, answers: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape[0]), torch.empty_like(hidden), torch.empty_like(head)


class _StackedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Float[Tensor, "M Q C"],
        head: Float[Tensor, "M V C"],
        answers: Int[Tensor, " Q"],
        products: torch.dtype,
    ) -> Float[Tensor, " M"]:
        losses, *gradients = _with_gradients(hidden, head, answers, products)
        ctx.save_for_backward(*gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_loss: Float[Tensor, " M"]
    ) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        scale = d_loss[:, None, None]
        return d_hidden * scale, d_head * scale, None, None
