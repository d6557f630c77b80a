"""The long convolution as a product of spectra: T log T, any device."""

import torch
from jaxtyping import Float
from torch import Tensor


def convolve_by_fft(
    x: Float[Tensor, "B T C"], taps: Float[Tensor, "L C"]
) -> Float[Tensor, "B T C"]:
    """As `reference.py` defines it, for L <= T, in the dtype of both."""
    T = x.shape[1]
    # A power of two with room for the whole linear convolution, so that nothing wraps round.
    size = 1 << (T + taps.shape[0] - 2).bit_length()
    spectrum = torch.fft.rfft(x, size, dim=1) * torch.fft.rfft(taps, size, dim=0)
    return torch.fft.irfft(spectrum, size, dim=1)[:, :T]
