"""The mathematics. Every fast path is tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def gated_short_convolution_reference(
    projected: Float[Tensor, "B T CC"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "B W-1 C"],
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B W-1 C"]]:
    """y_t = silu(sum_j weight_j x_(t-W+1+j)) * gate_t, a channel at a time.

    x is the first half of the projection's channels and gate the second. `past`
    holds the W - 1 inputs before x, oldest first. Returns y and the W - 1 inputs
    before the next token.
    """
    x, gate = projected.chunk(2, dim=-1)
    inputs = torch.cat([past, x], dim=1)
    y = F.conv1d(inputs.transpose(1, 2), weight[:, None], groups=weight.shape[0])
    return F.silu(y.transpose(1, 2)) * gate, inputs[:, x.shape[1] :]
