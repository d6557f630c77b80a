"""One token: the recurrent form."""

from jaxtyping import Float
from torch import Tensor

from based.ops.gated_short_convolution.shifted import gated_short_convolution
from based.ops.kernels import use_kernels


def gated_short_convolution_step(
    x: Float[Tensor, "B C"],
    gate: Float[Tensor, "B C"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "B W-1 C"],
) -> Float[Tensor, "B C"]:
    """y = silu(conv(x)) * gate for one token; `past` moves on by it, in place."""
    if use_kernels(x):
        from based.ops.gated_short_convolution.decode import convolution_step_kernel

        return convolution_step_kernel(x, gate, weight, past)
    y, after = gated_short_convolution(x[:, None], gate[:, None], weight, past)
    assert after is not None
    past.copy_(after)
    return y[:, 0]
