"""Where a decode step takes the fused projections, and their forms.

At few rows a step is the reading of the weights, and what else it launches is lost
time: here a norm, a gate or a convolution is part of the product beside it. Up to 128
rows a gate, a convolution or a sum of parts still is, and on Hopper the norm.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from based.ops.elementwise import swiglu
from based.ops.few_rows_linear import hopper
from based.ops.few_rows_linear.residual import (
    Projected,
    Residual,
    in_tiles,
    normed,
    plain,
    shares_norm,
    undivided,
)
from based.ops.few_rows_linear.weights import rows_of
from based.ops.gated_short_convolution import gated_short_convolution_step
from based.ops.kernels import use_kernels

# Above, tensor cores are faster. A residual stream of so many channels keeps these busy from fewer
# rows on.
MOST_ROWS = 4
WIDE, MOST_ROWS_WIDE = 1536, 2


def fuses(residual: Residual, *layers: nn.Module) -> bool:
    """Whether a step on these rows may read the layers' weights itself.

    Layers with an adapter, or quantised as `rows_of` does not know, are called instead. A branch
    in parts comes from tiles, and a norm by itself adds it up.
    """
    if isinstance(residual.branch, Projected):
        return False
    if isinstance(residual.branch, Tensor) and residual.branch.dim() > 2:
        return False
    if not _few(residual.x, residual.x.shape[1], *layers) or not all(map(readable, layers)):
        return False
    # Plain and quantised ones are not read side by side.
    return len({type(layer.weight) for layer in layers}) <= 1


def readable(layer: nn.Module) -> bool:
    """Whether kernels of few rows know how to read the layer's weight."""
    return type(layer) is nn.Linear and rows_of(layer.weight) is not None


def _few(x: Tensor, width: int, *layers: nn.Module) -> bool:
    """Whether rows are few for layers from or to a residual stream so wide."""
    if not use_kernels(x) or x.shape[0] > MOST_ROWS:
        return False
    plain_layers = [y for y in layers if isinstance(y, nn.Linear) and plain(y)]
    if x.shape[0] >= hopper.FEWEST_ROWS and hopper.runs(x.device):
        read = [layer for layer in plain_layers if hopper.reads(layer)]
        if read and len(read) == len(layers):
            return False
    halves = any(layer.weight.itemsize == 2 for layer in plain_layers)
    return x.shape[0] <= MOST_ROWS_WIDE or width < WIDE or not halves


def _whole(residual: Residual) -> tuple[Tensor, Tensor | None, Tensor, float]:
    """A residual whose branch is there, as kernels of few rows take it."""
    x, branch, weight, eps = residual
    assert not isinstance(branch, Projected)
    return x, branch if isinstance(branch, Tensor) else None, weight, eps


def norm_linear(
    residual: Residual,
    weights: Sequence[Float[Tensor, "_ C"]],
    bias: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"]]:
    """The residual's sum, and up to three projections of its norm, side by side."""
    from based.ops.few_rows_linear.decode import linear_kernel

    return linear_kernel(*_whole(residual), weights=weights, bias=bias)


def norm_logits(
    residual: Residual, weight: Float[Tensor, "V C"]
) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B P 4"] | None]:
    """The norm's projection to a vocabulary, and what sampling looks for first in parts of it.

    The latter where the same kernel finds it; see `token_sampling.sample_tokens`.
    """
    if residual.x.shape[0] and fuses(residual):
        return norm_linear(residual, [weight])[1], None
    if shares_norm(residual) and hopper.reads_logits(weight):
        return hopper.project_logits(undivided(residual)[1], weight)
    return F.linear(normed(residual)[1], weight), None


def norm_linears(
    residual: Residual, layers: Sequence[nn.Module]
) -> tuple[Float[Tensor, "B C"], tuple[Tensor, ...]]:
    """The residual's sum, and the outputs of up to three layers for its norm.

    Only a layer alone may have a bias where they are fused.
    """
    linear_layers = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(linear_layers) == 1 or all(layer.bias is None for layer in linear_layers):
        weights, sizes = [y.weight for y in linear_layers], [y.out_features for y in linear_layers]
        if fuses(residual, *layers):
            x, y = norm_linear(residual, weights, linear_layers[0].bias)
            return x, y.split(sizes, dim=-1)
        if shares_norm(residual, *layers):
            x, scaled = undivided(residual)
            return x, hopper.project_side_by_side(scaled, weights, linear_layers[0].bias).split(
                sizes, -1
            )
    x, y = normed(residual)
    return x, linears(y, layers)


def norm_linear_swiglu(
    residual: Residual, layer: nn.Module
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"]]:
    """The residual's sum, and value * silu(gate), the two halves of the layer's output."""
    if fuses(residual, layer):
        assert isinstance(layer, nn.Linear)
        from based.ops.few_rows_linear.decode import linear_kernel

        projection = {"weights": [layer.weight], "bias": layer.bias}
        return linear_kernel(*_whole(residual), **projection, swiglu=True)
    if shares_norm(residual, layer):
        assert isinstance(layer, nn.Linear)
        x, scaled = undivided(residual)
        return x, hopper.project_gated(scaled, layer.weight, layer.bias)
    x, y = normed(residual)
    return x, linear_swiglu(y, layer)


def norm_linear_convolution(
    residual: Residual,
    layer: nn.Module,
    taps: Float[Tensor, "N W"],
    past: Float[Tensor, "B P N"],
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"]]:
    """The residual's sum, and silu(conv(u)) * g, u and g the halves of the layer's output.

    `past` moves on by one token, in place.
    """
    if fuses(residual, layer):
        assert isinstance(layer, nn.Linear)
        from based.ops.few_rows_linear.decode import linear_kernel

        projection = {"weights": [layer.weight], "bias": layer.bias}
        return linear_kernel(*_whole(residual), **projection, taps=taps, past=past)
    if taps.dtype == residual.weight.dtype and shares_norm(residual, layer):
        assert isinstance(layer, nn.Linear)
        x, scaled = undivided(residual)
        return x, hopper.project_gated(scaled, layer.weight, layer.bias, taps, past)
    x, y = normed(residual)
    return x, linear_convolution(y, layer, taps, past)


def linear(
    x: Float[Tensor, "B C"], layer: nn.Module, counter: Int[Tensor, " B"] | None = None
) -> Float[Tensor, "*S B N"] | Projected:
    """The layer's output for a residual stream, or what the norm that follows makes it of.

    `counter`, of tokens seen, is advanced by one in passing, then or now.
    """
    if readable(layer) and isinstance(layer, nn.Linear) and _few(x, layer.out_features, layer):
        from based.ops.few_rows_linear.decode import linear_kernel

        return linear_kernel(x, weights=[layer.weight], bias=layer.bias, counter=counter)[1]
    if plain(layer) and use_kernels(x):
        assert isinstance(layer, nn.Linear)
        return Projected(x, layer, counter)
    if counter is not None:
        counter += 1
    return layer(x)


def linear_swiglu(x: Float[Tensor, "B C"], layer: nn.Module) -> Float[Tensor, "B N"]:
    """value * silu(gate), the two halves of the layer's output."""
    y = _gated_in_tiles(x, layer)
    return swiglu(layer(x)) if y is None else y


def linear_convolution(
    x: Float[Tensor, "B C"],
    layer: nn.Module,
    taps: Float[Tensor, "N W"],
    past: Float[Tensor, "B P N"],
) -> Float[Tensor, "B N"]:
    """silu(conv(u)) * g, u and g the halves of the layer's output; `past` moves on, in place."""
    y = _gated_in_tiles(x, layer, taps, past) if taps.dtype == x.dtype else None
    if y is not None:
        return y
    projected = layer(x)
    return gated_short_convolution_step(projected, taps.to(projected.dtype), past)


def _gated_in_tiles(
    x: Tensor, layer: nn.Module, taps: Tensor | None = None, past: Tensor | None = None
) -> Tensor | None:
    """None where no kernel takes the call."""
    if not in_tiles(x, layer):
        return None
    assert isinstance(layer, nn.Linear)
    from based.ops.few_rows_linear.tiles import gated_kernel, whole_tile

    tile = whole_tile(x.shape[1], layer.out_features)
    return None if tile is None else gated_kernel(x, layer.weight, layer.bias, taps, past, tile)


def linears(x: Float[Tensor, "B C"], layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The outputs of up to three layers; a layer alone is called, which is faster."""
    unbiased = [layer for layer in layers if isinstance(layer, nn.Linear) and layer.bias is None]
    if 1 < len(unbiased) == len(layers) and all(in_tiles(x, layer) for layer in unbiased):
        from based.ops.few_rows_linear.tiles import side_by_side_kernel, whole_tile

        sizes = [layer.out_features for layer in unbiased]
        tile = whole_tile(x.shape[1], *sizes)
        if tile is not None:
            y = side_by_side_kernel(x, [layer.weight for layer in unbiased], tile)
            return y.split(sizes, dim=-1)
    return tuple(layer(x) for layer in layers)
