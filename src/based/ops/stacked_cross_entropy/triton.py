"""The same in place as a Triton kernel: a program holds one row of logits in registers."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


def softmax_gradient_kernel_(
    logits: Float[Tensor, "M Q V"], answers: Int[Tensor, " Q"], scale: float
) -> Float[Tensor, " M"]:
    """See `gradient.softmax_gradient_`."""
    models, queries, vocabulary = logits.shape
    losses = torch.empty(models, queries, dtype=torch.float32, device=logits.device)
    block = triton.next_power_of_2(vocabulary)
    _kernel[(models * queries,)](
        *(logits, answers, losses, queries, vocabulary, scale),
        BLOCK=block,
        num_warps=8,  # pyright: ignore[reportCallIssue]
    )
    return losses.sum(-1)


@triton.jit
def _kernel(logits, answers, losses, queries, vocabulary, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < vocabulary
    pointers = logits + row.to(tl.int64) * vocabulary + column
    x = tl.load(pointers, inside, float("-inf")).to(tl.float32)
    answer = tl.load(answers + row % queries)
    largest = tl.max(x, 0)
    e = tl.exp(x - largest)
    total = tl.sum(e, 0)
    hit = column == answer
    tl.store(losses + row, largest + tl.log(total) - tl.sum(tl.where(hit, x, 0.0), 0))
    gradient = (e / total - tl.where(hit, 1.0, 0.0)) * scale
    tl.store(pointers, gradient.to(logits.dtype.element_ty), inside)
