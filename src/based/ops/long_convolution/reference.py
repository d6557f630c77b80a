"""The mathematics, in quadratic time. Every fast path is tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor


def long_convolution_reference(
    x: Float[Tensor, "B T C"], taps: Float[Tensor, "L C"]
) -> Float[Tensor, "B T C"]:
    """y_t = sum_j taps_j x_(t-j) over 0 <= j <= t, a channel at a time; taps past L are zero."""
    y = torch.zeros_like(x)
    for lag in range(min(taps.shape[0], x.shape[1])):
        y[:, lag:] += taps[lag] * x[:, : x.shape[1] - lag]
    return y
