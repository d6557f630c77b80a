"""The mathematics. The kernels are tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor


def gated_norm_reference(
    y: Float[Tensor, "B *T H P"],
    u: Float[Tensor, "B *T H P"],
    z: Float[Tensor, "B *T C"],
    skip: Float[Tensor, " H"],
    weight: Float[Tensor, " C"],
    eps: float = 1e-5,
) -> Float[Tensor, "B *T C"]:
    """g = (y + skip u) silu(z), skip a number a head, C = H P; then g / rms(g) * weight."""
    g = (y + skip[:, None] * u).flatten(-2) * z * torch.sigmoid(z)
    return g * torch.rsqrt(g.square().mean(-1, keepdim=True) + eps) * weight
