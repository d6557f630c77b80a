"""Where a decode step takes the fused projections, and their forms.

At few rows a step is the reading of the weights, and what else it launches is lost
time: here a norm, a gate or a convolution is part of the product beside it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from based.ops.elementwise import Residual
from based.ops.kernels import use_kernels

# Above, matrix products on tensor cores are faster.
MOST_ROWS = 4


def fuses(residual: Residual, *layers: nn.Module) -> bool:
    """Whether a step on these rows may read the layers' weights itself.

    Layers that are not plain (quantised, or with an adapter) are called instead.
    """
    plain = all(type(y) is nn.Linear and type(y.weight) is nn.Parameter for y in layers)
    return plain and residual.x.shape[0] <= MOST_ROWS and use_kernels(residual.x)


def norm_linear(
    residual: Residual,
    weights: Sequence[Float[Tensor, "_ C"]],
    bias: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"]]:
    """The residual's sum, and up to three projections of its norm, side by side."""
    from based.ops.few_rows_linear.decode import linear_kernel

    return linear_kernel(*residual, weights=weights, bias=bias)


def norm_linear_swiglu(
    residual: Residual, weight: Float[Tensor, "NN C"]
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"]]:
    """The residual's sum, and value * silu(gate), the two halves of its norm's projection."""
    from based.ops.few_rows_linear.decode import linear_kernel

    return linear_kernel(*residual, weights=[weight], swiglu=True)


def norm_linear_convolution(
    residual: Residual,
    weight: Float[Tensor, "NN C"],
    bias: Float[Tensor, " NN"],
    taps: Float[Tensor, "N W"],
    past: Float[Tensor, "B P N"],
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"]]:
    """The residual's sum, and silu(conv(u)) * g, u and g the halves of its norm's projection.

    `past` moves on by one token, in place.
    """
    from based.ops.few_rows_linear.decode import linear_kernel

    return linear_kernel(*residual, weights=[weight], bias=bias, taps=taps, past=past)


def linear(
    x: Float[Tensor, "B C"], layer: nn.Linear, counter: Int[Tensor, " B"] | None = None
) -> Float[Tensor, "B N"]:
    """The layer's output; `counter`, of tokens seen, is advanced by one in passing."""
    from based.ops.few_rows_linear.decode import linear_kernel

    out = linear_kernel(x, weights=[layer.weight], bias=layer.bias, counter=counter)[1]
    assert isinstance(out, torch.Tensor)
    return out
