"""The mathematics, a token at a time. Every fast path is tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor


def selective_scan_reference(
    x: Float[Tensor, "B T D"],
    delta: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """h_t = exp(delta_t A) h_(t-1) + delta_t x_t b_t^T and y_t = h_t c_t; A < 0 < delta."""
    outs = []
    for t in range(x.shape[1]):
        state = (delta[:, t, :, None] * A).exp() * state
        state = state + (delta[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        outs.append((state * c[:, t, None, :]).sum(-1))
    return torch.stack(outs, dim=1), state
