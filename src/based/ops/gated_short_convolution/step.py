"""One token: the recurrent form."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from based.ops.gated_short_convolution.shifted import gated_short_convolution, next_past
from based.ops.kernels import use_kernels


def short_convolution_step(
    x: Float[Tensor, "B C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    past: Float[Tensor, "B W-1 C"],
) -> Float[Tensor, "B C"]:
    """y = silu(conv(x) + bias) for one token; `past` moves on by it, in place."""
    if use_kernels(x):
        from based.ops.gated_short_convolution.decode import convolution_step_kernel

        return convolution_step_kernel(x, None, weight, past, bias)
    window = torch.cat([past.to(x.dtype), x[:, None]], dim=1)
    past.copy_(window[:, 1:])
    y = (window * weight.T.to(x.dtype)).sum(1)
    return F.silu(y if bias is None else y + bias.to(y.dtype))


def gated_short_convolution_step(
    projected: Float[Tensor, "B CC"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "B W-1 C"],
) -> Float[Tensor, "B C"]:
    """y = silu(conv(x)) * gate for one token; `past` moves on by it, in place."""
    if use_kernels(projected):
        from based.ops.gated_short_convolution.decode import convolution_step_kernel

        x, gate = projected.chunk(2, dim=-1)
        return convolution_step_kernel(x, gate, weight, past)
    y = gated_short_convolution(projected[:, None], weight, past)
    past.copy_(next_past(projected[:, None, : weight.shape[0]], past))
    return y[:, 0]
