"""The forward pass is one batched product; so would the weights' gradient be, on few programs.

Of a model of width 64 it is a single tile, summed over every token by one
multiprocessor. Here the tokens are split, and the parts' sums are added.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

# Output tiles, of 64 by 64, that fill a large GPU twice.
TILES, TILE = 264, 64
# Tokens that a part has at least.
PART = 256


def stacked_linear(
    x: Float[Tensor, "M N C"], weight: Float[Tensor, "M O C"], bias: Float[Tensor, "M O"] | None
) -> Float[Tensor, "M N O"]:
    """Linear layers of M models, each on its own N rows, as `reference.py` defines them.

    Under autocast in its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _StackedLinear.apply(x, weight, bias)


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        parts = _parts(len(x), x.shape[1], x.shape[2], weight.shape[1])
        split_x, split_dy = (z.unflatten(1, (parts, -1)).flatten(0, 1) for z in (x, dy))
        d_weight = torch.bmm(split_dy.mT, split_x).unflatten(0, (-1, parts)).sum(1)
        d_bias = dy.sum(1) if ctx.has_bias else None
        return torch.bmm(dy, weight), d_weight, d_bias


def _parts(models: int, rows: int, columns: int, out: int) -> int:
    """Into how many parts of the same size rows are split: a power of two."""
    tiles = models * -(-columns // TILE) * -(-out // TILE)
    parts = 1
    while parts * tiles < TILES and rows % (2 * parts) == 0 and rows >= 2 * parts * PART:
        parts *= 2
    return parts
