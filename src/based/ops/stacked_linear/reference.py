"""The mathematics. The split form is tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor


def stacked_linear_reference(
    x: Float[Tensor, "M N C"], weight: Float[Tensor, "M O C"], bias: Float[Tensor, "M O"] | None
) -> Float[Tensor, "M N O"]:
    """x_m W_m^T + b_m, a model m at a time."""
    y = torch.einsum("mnc,moc->mno", x, weight)
    return y if bias is None else y + bias[:, None]
