"""A residual stream between two half-layers of a decode step, not yet added up and normed."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from based.ops.elementwise import add_rms_norm
from based.ops.kernels import use_kernels

# Above, library calls are faster.
MOST_ROWS_IN_TILES = 128


class Projected(NamedTuple):
    """A branch before its last projection, in which the norm that follows may take part."""

    x: Float[Tensor, "B C"]
    layer: nn.Linear
    counter: Int[Tensor, " B"] | None

    def product(self) -> tuple[Float[Tensor, "*S B N"], Float[Tensor, " N"] | None]:
        """The branch, perhaps as float32 parts of a sum, and a bias that it still lacks.

        The counter is advanced by one. A library call without a bias is faster.
        """
        weight, bias = self.layer.weight, self.layer.bias
        if in_tiles(self.x, self.layer):
            from based.ops.few_rows_linear.tiles import divide, parts_kernel

            division = divide(*weight.shape)
            if division is not None:
                return parts_kernel(self.x, weight, bias, self.counter, division), None
        if self.counter is not None:
            self.counter.add_(1)
        return F.linear(self.x, weight), bias


class Residual(NamedTuple):
    """A residual stream x + branch, and the RMSNorm that the next branch begins with.

    For whoever computes it. A branch may come as parts of a sum, or before its projection.
    """

    x: Float[Tensor, "B C"]
    branch: Float[Tensor, "*S B C"] | Projected | None
    weight: Float[Tensor, " C"]
    eps: float

    def normed(self) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
        """x + branch, and its norm."""
        branch, bias = self.branch, None
        if isinstance(branch, Projected):
            branch, bias = branch.product()
        return add_rms_norm(self.x, branch, self.weight, self.eps, bias)


def plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias alone: no adapter, nothing quantised."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def in_tiles(x: Tensor, layer: nn.Module) -> bool:
    """Whether kernels multiply so many rows in tiles."""
    few = use_kernels(x) and x.element_size() == 2 and x.shape[0] <= MOST_ROWS_IN_TILES
    return few and plain(layer)
