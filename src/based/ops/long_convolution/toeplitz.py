"""The long convolution of short sequences as matrix products: quadratic, and far fewer passes.

A Fourier transform along the sequence reads and writes its padded, complex copies
many times; a GPU multiplies a channel's T x T matrix by all rows in less.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def toeplitz(response: Float[Tensor, "C T"]) -> Float[Tensor, "C T T"]:
    """M[t, s] = response[t - s], zero for s > t, a channel at a time.

    A view of windows: gathering by index would sort all of M for its gradient.
    """
    T = response.shape[-1]
    return F.pad(response, (T - 1, 0)).unfold(-1, T, 1).flip(-1)


def convolve_by_products(
    x: Float[Tensor, "B T C"], taps: Float[Tensor, "L C"]
) -> Float[Tensor, "B T C"]:
    """As `reference.py` defines it, for L <= T, in the dtype of both.

    Without a copy from and to tokens last in memory.
    """
    matrix = toeplitz(F.pad(taps.T, (0, x.shape[1] - taps.shape[0])))
    return torch.einsum("bsc,cts->btc", x, matrix)
