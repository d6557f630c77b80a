"""One token: the recurrent form."""

from jaxtyping import Float
from torch import Tensor

from based.ops.gated_short_convolution.operator import gated_short_convolution
from based.ops.kernels import use_kernels


def gated_short_convolution_step(
    projected: Float[Tensor, "B CC"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "B W-1 C"],
) -> Float[Tensor, "B C"]:
    """y = silu(conv(x)) * gate for one token; `past` moves on by it, in place."""
    if use_kernels(projected):
        from based.ops.gated_short_convolution.decode import convolution_step_kernel

        x, gate = projected.chunk(2, dim=-1)
        return convolution_step_kernel(x, gate, weight, past)
    y, after = gated_short_convolution(projected[:, None], weight, past)
    assert after is not None
    past.copy_(after)
    return y[:, 0]
