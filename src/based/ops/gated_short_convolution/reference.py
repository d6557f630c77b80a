"""The mathematics. Every fast path is tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def gated_short_convolution_reference(
    x: Float[Tensor, "B T C"],
    gate: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "B W-1 C"],
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B W-1 C"]]:
    """y_t = silu(sum_j weight_j x_(t-W+1+j)) * gate_t, a channel at a time.

    `past` holds the W - 1 inputs before x, oldest first. Returns y and the
    W - 1 inputs before the next token.
    """
    inputs = torch.cat([past, x], dim=1)
    y = F.conv1d(inputs.transpose(1, 2), weight[:, None], groups=weight.shape[0])
    return F.silu(y.transpose(1, 2)) * gate, inputs[:, x.shape[1] :]
