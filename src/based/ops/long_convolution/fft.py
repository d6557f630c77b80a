"""The long convolution as a product of spectra: T log T, any device."""

import torch
from jaxtyping import Float
from torch import Tensor

from based.ops.precision import state_dtype


def long_convolution(
    x: Float[Tensor, "B T C"], taps: Float[Tensor, "L C"]
) -> Float[Tensor, "B T C"]:
    """As `reference.py` defines it, in x's dtype; computed in float32, or float64 for float64.

    Rounding is relative to the largest value of the whole sequence, later tokens
    included; a NaN or infinity anywhere in it reaches every output.
    """
    T, wide = x.shape[1], state_dtype(x.dtype)
    if T == 0:
        return x
    taps = taps[:T].to(wide)
    # A power of two with room for the whole linear convolution, so that nothing wraps round.
    size = 1 << (T + taps.shape[0] - 2).bit_length()
    spectrum = torch.fft.rfft(x.to(wide), size, dim=1) * torch.fft.rfft(taps, size, dim=0)
    return torch.fft.irfft(spectrum, size, dim=1)[:, :T].to(x.dtype)
