"""Which form a long convolution takes."""

from jaxtyping import Float
from torch import Tensor

from based.ops.long_convolution.fft import convolve_by_fft
from based.ops.long_convolution.toeplitz import convolve_by_products
from based.ops.precision import state_dtype, without_autocast

# Tokens up to which a GPU multiplies faster than it transforms: of as many rows at least,
# so that the matrices are no larger than the inputs.
MOST_TOKENS = 512


@without_autocast
def long_convolution(
    x: Float[Tensor, "B T C"], taps: Float[Tensor, "L C"]
) -> Float[Tensor, "B T C"]:
    """As `reference.py` defines it, in x's dtype; computed in float32, or float64 for float64.

    Rounding is relative to the largest value of the whole sequence, later tokens
    included, and a NaN or infinity anywhere in it reaches every output; float32 products
    are in TF32 where torch's are.
    """
    (B, T, _), wide = x.shape, state_dtype(x.dtype)
    if T == 0:
        return x
    short = x.is_cuda and min(MOST_TOKENS, B) >= T
    convolve = convolve_by_products if short else convolve_by_fft
    return convolve(x.to(wide), taps[:T].to(wide)).to(x.dtype)
