"""What stands between a decode step's matrix products, each as one kernel on a GPU."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from based.ops.kernels import use_kernels


def add_rms_norm(
    x: Float[Tensor, "B C"],
    branch: Float[Tensor, "*S B C"] | None,
    weight: Float[Tensor, " C"],
    eps: float,
    bias: Float[Tensor, " C"] | None = None,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """x + branch + bias, and that divided by its root mean square, times weight, in its dtype.

    x is the residual stream, float32 or wider, and so is the arithmetic. A branch may come as
    parts of a sum; a bias comes with a branch. No gradients.
    """
    if use_kernels(x):
        from based.ops.elementwise_decode import add_rms_norm_kernel

        return add_rms_norm_kernel(x, branch, weight, eps, bias)
    if branch is not None:
        x = x + (branch if branch.dim() == x.dim() else branch.sum(0))
        x = x if bias is None else x + bias
    normed = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return x, normed.to(weight.dtype)


def embed(tokens: Int[Tensor, " B"], table: Float[Tensor, "V C"]) -> Float[Tensor, "B C"]:
    """The tokens' rows of the table as a residual stream: float32, or float64 of such a table.

    No gradients.
    """
    if use_kernels(table):
        from based.ops.elementwise_decode import embed_kernel

        return embed_kernel(tokens, table)
    return F.embedding(tokens, table).to(torch.promote_types(table.dtype, torch.float32))


def embed_with_squares(
    tokens: Int[Tensor, " B"], table: Float[Tensor, "V C"], weight: Float[Tensor, " C"], width: int
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"], Float[Tensor, "tiles B"]]:
    """x as `embed` has it, x times weight, in its dtype, and sums of squares of `width` channels.

    That is RMSNorm but for the division. The channels are a multiple of `width`, a power of
    two. No gradients.
    """
    if use_kernels(table):
        from based.ops.elementwise_decode import embed_with_squares_kernel

        return embed_with_squares_kernel(tokens, table, weight, width)
    x = embed(tokens, table)
    squares = x.square().unflatten(1, (-1, width)).sum(2)
    return x, (x * weight).to(weight.dtype), squares.T.contiguous()


def swiglu(x: Float[Tensor, "B CC"]) -> Float[Tensor, "B C"]:
    """value * silu(gate), value the first half of the channels and gate the second. No gradients.

    On a GPU the arithmetic is float32.
    """
    if use_kernels(x):
        from based.ops.elementwise_decode import swiglu_kernel

        return swiglu_kernel(x)
    value, gate = torch.chunk(x, 2, dim=-1)
    return value * F.silu(gate)
