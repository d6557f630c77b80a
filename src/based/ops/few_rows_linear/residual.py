"""A residual stream between two half-layers of a decode step, not yet added up and normed."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from based.ops.elementwise import add_rms_norm, embed, embed_with_squares
from based.ops.few_rows_linear import hopper
from based.ops.kernels import use_kernels

# Above, library calls are faster.
MOST_ROWS_IN_TILES = 128


class Projected(NamedTuple):
    """A branch before its last projection, in which the norm that follows may take part."""

    x: Float[Tensor, "B C"]
    layer: nn.Linear
    counter: Int[Tensor, " B"] | None


Branch = Float[Tensor, "*S B C"] | Projected | hopper.Scaled | None


class Residual(NamedTuple):
    """A residual stream x + branch, and the RMSNorm that the next branch begins with.

    For whoever computes it. A branch may come as parts of a sum, or before its projection; or
    there is none, and the norm has been begun.
    """

    x: Float[Tensor, "B C"]
    branch: Branch
    weight: Float[Tensor, " C"]
    eps: float


def embedded(
    tokens: Int[Tensor, " B"], table: Float[Tensor, "V C"], gain: Float[Tensor, " C"], eps: float
) -> tuple[Float[Tensor, "B C"], hopper.Scaled | None]:
    """The residual stream of tokens, float32 or wider, and its norm but for the division.

    The latter where products of so many rows may share it.
    """
    able = hopper.FEWEST_ROWS <= len(tokens) <= MOST_ROWS_IN_TILES and use_kernels(table)
    if able and hopper.takes(gain) and gain.shape[0] % hopper.OUTPUTS == 0:
        x, scaled, squares = embed_with_squares(tokens, table, gain, hopper.OUTPUTS)
        return x, hopper.Scaled(scaled, squares, eps)
    return embed(tokens, table), None


def normed(residual: Residual) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """x + branch, and its norm."""
    x, branch, weight, eps = residual
    bias = None
    if isinstance(branch, Projected):
        if shares_norm(residual):
            # Whoever divides reads the sum itself, which is rounded once less.
            (x, _), branch = undivided(residual), None
        else:
            branch, bias = product(branch)
    elif isinstance(branch, hopper.Scaled):
        branch = None
    return add_rms_norm(x, branch, weight, eps, bias)


def shares_norm(residual: Residual, *layers: nn.Module) -> bool:
    """Whether what projects before a norm, if anything does, and layers after it share it."""
    x, branch, gain, _ = residual
    if isinstance(branch, Projected):
        layers = branch.layer, *layers
    elif not isinstance(branch, hopper.Scaled):
        return False
    linear_layers = [y for y in layers if isinstance(y, nn.Linear)]
    return _few(x) and all(map(plain, layers)) and hopper.takes(gain, *linear_layers)


def undivided(residual: Residual) -> tuple[Float[Tensor, "B C"], hopper.Scaled]:
    """The residual's sum, and its norm but for the division, where the norm is shared."""
    x, branch, gain, eps = residual
    if isinstance(branch, Projected):
        projection = branch.x, branch.layer.weight, branch.layer.bias, branch.counter
        return hopper.project_back(*projection, residual=x, gain=gain, eps=eps)
    assert isinstance(branch, hopper.Scaled)
    return x, branch


def product(branch: Projected) -> tuple[Float[Tensor, "*S B N"], Float[Tensor, " N"] | None]:
    """The branch, perhaps as float32 parts of a sum, and a bias that it still lacks.

    The counter is advanced by one. A library call without a bias is faster.
    """
    x, layer, counter = branch
    if in_tiles(x, layer):
        from based.ops.few_rows_linear.tiles import divide, parts_kernel

        division = divide(*layer.weight.shape)
        if division is not None:
            return parts_kernel(x, layer.weight, layer.bias, counter, division), None
    if counter is not None:
        counter += 1
    return F.linear(x, layer.weight), layer.bias


def plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias alone: no adapter, nothing quantised."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def in_tiles(x: Tensor, layer: nn.Module) -> bool:
    """Whether kernels multiply so many rows in tiles."""
    return _few(x) and x.element_size() == 2 and plain(layer)


def _few(x: Tensor) -> bool:
    return use_kernels(x) and x.shape[0] <= MOST_ROWS_IN_TILES
