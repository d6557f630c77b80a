"""Parts that several recurrent mixers share."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from based.errors import BasedError
from based.mixers.base import TensorSpec, at_least_one
from based.ops.gated_short_convolution.shifted import next_past
from based.ops.gated_short_convolution.step import short_convolution_step
from based.ops.precision import state_dtype
from based.ops.row_norm import rms_norm
from based.ops.short_convolution import activated_convolution


class ShortConvolution(nn.Module):
    """silu of a causal convolution over the last `kernel_size` tokens, a channel at a time.

    Its state is the last kernel_size - 1 inputs.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool = False) -> None:
        super().__init__()
        at_least_one(kernel_size=kernel_size)
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def state_spec(self) -> TensorSpec:
        """What one sequence needs."""
        channels, kernel_size = self.weight.shape
        return TensorSpec((kernel_size - 1, channels))

    def forward(
        self, x: Float[Tensor, "B T C"], past: Float[Tensor, "B P C"] | None = None
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B P C"] | None]:
        """The convolved inputs, and the next state if one was given."""
        y = activated_convolution(x, self.weight, self.bias, past=past)
        return y, None if past is None else next_past(x, past)

    def step(self, x: Float[Tensor, "B C"], past: Float[Tensor, "B P C"]) -> Float[Tensor, "B C"]:
        """One token for every row; changes the state in place."""
        return short_convolution_step(x, self.weight, self.bias, past)


def time_step_bias(size: int) -> Float[Tensor, " C"]:
    """The bias before a softplus whose outputs begin log-uniform in 0.001 .. 0.1 (Mamba's)."""
    step = torch.exp(math.log(1e-3) + torch.rand(size) * (math.log(0.1) - math.log(1e-3)))
    return step + torch.log(-torch.expm1(-step))


def head_norm(
    x: Float[Tensor, "... H D"], weight: Float[Tensor, " D"], eps: float = 1e-5
) -> Float[Tensor, "... C"]:
    """RMSNorm of each head; the heads side by side again."""
    return rms_norm(x, weight.to(x.dtype), eps).flatten(-2)


def unit(x: Float[Tensor, "... D"], eps: float = 1e-6) -> Float[Tensor, "... D"]:
    """x / |x|; `eps` keeps a zero vector zero."""
    square = x.to(state_dtype(x.dtype)).square().sum(-1, keepdim=True)
    return x * torch.rsqrt(square + eps).to(x.dtype)


def token_shift(
    x: Float[Tensor, "B T C"], last: Float[Tensor, "B C"] | None
) -> Float[Tensor, "B T C"]:
    """The token before each: `last`, or zeros, before the first."""
    first = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
    return torch.cat([first[:, None], x[:, :-1]], dim=1)


def head_layer_norm(
    x: Float[Tensor, "... H D"], weight: Float[Tensor, " C"], bias: Float[Tensor, " C"]
) -> Float[Tensor, "... C"]:
    """RWKV's group norm: LayerNorm of each head, eps 1e-5 * head_dim, then a scale and shift."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-5 * x.shape[-1]).flatten(-2)
    return normed * weight.to(x.dtype) + bias.to(x.dtype)


def heads_of(width: int, head_dim: int) -> int:
    """How many heads of that size the width holds, or one line that says why it does not."""
    at_least_one(head_dim=head_dim)
    if width % head_dim:
        raise BasedError(f"head_dim {head_dim} does not divide {width}; choose a divisor of it")
    return width // head_dim
