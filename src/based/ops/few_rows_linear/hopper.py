"""Products of up to 128 rows in CUDA C++ for Hopper, and a norm that costs no kernel.

A projection back to the residual stream adds itself to that, multiplies by the gain of the norm
that follows, and leaves sums of squares: by the root of their mean the next product divides
what it has made (RMSNorm is a division of rows, which a product lets through). Clusters of
programs divide the channels and add up in each other's shared memory.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from based.ops import cuda, kernels

# As in product.cuh: rows of W of a tile, channels of a step, warps that multiply.
OUTPUTS, LANES, WARPS = 64, 64, 4
# Those that multiply and a warp that copies; another one finds the scales of a norm.
THREADS = 32 * (WARPS + 1)
# Parts of the channels, and how many programs in clusters of so many an H100 or H200 seats.
SEATS = {1: 132, 2: 132, 4: 120}
# Rows of x that a product has are a multiple of this: eights, in four parts.
EIGHTS = 32
# Outputs of a tile of logits, its steps in flight by rows of x, and those whose weights come first.
LOGITS, LOGITS_STAGES, LOGITS_FIRST = 128, {64: 9, 128: 7}, 2
# Fewer are faster in kernels of few rows.
FEWEST_ROWS = 2


class Scaled(NamedTuple):
    """A norm's output but for the division: x times the norm's gain, and x's sums of squares."""

    x: Float[Tensor, "B C"]
    squares: Float[Tensor, "tiles B"]
    eps: float


def takes(x: Tensor, *layers: nn.Linear) -> bool:
    """Whether the kernels here multiply these layers' weights by up to 128 rows such as x."""
    return x.dtype == torch.bfloat16 and runs(x.device) and all(map(reads, layers))


def runs(device: torch.device) -> bool:
    """Whether the kernels here run on it."""
    return kernels.HOPPER and cuda.is_hopper(device) and not torch.compiler.is_compiling()


def reads(layer: nn.Linear) -> bool:
    """Whether a layer's weight is such as the kernels here read."""
    halves = layer.bias is None or layer.bias.dtype == torch.bfloat16
    return halves and layer.out_features % OUTPUTS == 0 and _copies(layer.weight)


def _copies(weight: Tensor) -> bool:
    """Whether steps of a weight are copied by a map, which begins at a multiple of 16 bytes."""
    aligned = weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return aligned and weight.dtype == torch.bfloat16 and weight.shape[1] % LANES == 0


def project_back(
    x: Float[Tensor, "B C"],
    weight: Float[Tensor, "N C"],
    bias: Float[Tensor, " N"] | None,
    counter: Int[Tensor, " B"] | None,
    residual: Float[Tensor, "B N"],
    gain: Float[Tensor, " N"],
    eps: float,
) -> tuple[Float[Tensor, "B N"], Scaled]:
    """residual + x W^T + bias, and its norm but for the division.

    All tensors are contiguous; `counter` is advanced by one.
    """
    (N, C), rows = weight.shape, x.shape[0]
    parts, block = _parts(N // OUTPUTS, C), _block(rows)
    run = _kernel("product_back", block, C, parts, 4 * WARPS * block // parts, x.device, N=N)
    total, scaled = torch.empty_like(residual), torch.empty_like(residual, dtype=gain.dtype)
    squares = torch.empty((N // OUTPUTS, rows), dtype=torch.float32, device=x.device)
    maps = _rows(x, block), _blocks(weight, gated=False)
    given = residual, _or_null(bias), gain
    grid = N // OUTPUTS * parts, THREADS
    overlap = kernels.overlap(x)["OVERLAP"]
    run(*grid, *maps, *given, total, scaled, squares, _or_null(counter), rows, overlap=overlap)
    return total, Scaled(scaled, squares, eps)


def project_gated(
    scaled: Scaled,
    weight: Float[Tensor, "NN C"],
    bias: Float[Tensor, " NN"] | None,
    taps: Float[Tensor, "N W"] | None = None,
    past: Float[Tensor, "B P N"] | None = None,
) -> Float[Tensor, "B N"]:
    """The first half of the norm's projection by silu of the second; with taps silu(conv) by it.

    All tensors are contiguous; `past` moves on by one token, in place.
    """
    x, width = scaled.x, 0 if taps is None else taps.shape[1]
    (NN, C), rows = weight.shape, x.shape[0]
    parts, block = _parts(NN // OUTPUTS, C), _block(rows)
    scratch = 4 * block // parts
    run = _kernel("product_gated", block, C, parts, scratch, x.device, N=NN // 2, WIDTH=width)
    out = torch.empty((rows, NN // 2), dtype=x.dtype, device=x.device)
    maps = _rows(x, block), _blocks(weight, gated=True)
    given = scaled.squares, _or_null(bias), _or_null(taps), _or_null(past)
    grid = NN // OUTPUTS * parts, THREADS + 32
    overlap = kernels.overlap(x, reads_state=past is not None)["OVERLAP"]
    run(*grid, *maps, *given, out, scaled.eps, rows, overlap=overlap)
    return out


def project_side_by_side(
    scaled: Scaled, weights: Sequence[Float[Tensor, "_ C"]], bias: Float[Tensor, " N"] | None
) -> Float[Tensor, "B N"]:
    """The norm's projections by up to three weights, the bias of all of them."""
    x, sizes = scaled.x, [weight.shape[0] for weight in weights]
    C, rows, N = x.shape[1], x.shape[0], sum(sizes)
    second, third = (sum(sizes[:n]) if len(sizes) > n else N for n in (1, 2))
    parts, block = _parts(N // OUTPUTS, C), _block(rows)
    constants = {"N": N, "SECOND": second, "THIRD": third}
    run = _kernel(
        "product_side_by_side", block, C, parts, 4 * block // parts, x.device, **constants
    )
    out = torch.empty((rows, N), dtype=x.dtype, device=x.device)
    maps = [_blocks(weight, gated=False) for weight in weights]
    maps = _rows(x, block), *maps, *maps[:1] * (3 - len(maps))
    grid = N // OUTPUTS * parts, THREADS + 32
    given = scaled.squares, _or_null(bias), out, scaled.eps, rows
    run(*grid, *maps, *given, overlap=kernels.overlap(x)["OVERLAP"])
    return out


def reads_logits(weight: Tensor) -> bool:
    """Whether `project_logits` reads this weight."""
    outputs = weight.shape[0]
    return outputs % 8 == 0 and outputs >= LOGITS and _copies(weight)


def project_logits(
    scaled: Scaled, weight: Float[Tensor, "N C"]
) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B tiles 4"]]:
    """The norm's projection to many outputs, and in each 128 of a row what sampling looks for.

    That is as `token_sampling` has it: the largest, the sum of exp of others less it, its number
    (as bits), and how many are not finite.
    """
    x, (N, C), rows = scaled.x, weight.shape, scaled.x.shape[0]
    block = 64 if rows <= 64 else 128
    tiles = -(-N // LOGITS)
    run = _logits_kernel(block, C, N, x.device)
    out = torch.empty((rows, N), dtype=x.dtype, device=x.device)
    peaks = torch.empty((rows, tiles, 4), dtype=torch.float32, device=x.device)
    maps = _rows(x, block), _outputs(weight), _outputs(weight[-LOGITS:])
    given = scaled.squares, out, peaks, scaled.eps, rows
    grid = min(tiles, SEATS[1]), 2 * block + 64
    run(*grid, *maps, *given, overlap=kernels.overlap(x)["OVERLAP"])
    return out, peaks


def _block(rows: int) -> int:
    return -(-rows // EIGHTS) * EIGHTS


def _parts(tiles: int, channels: int) -> int:
    """Parts of the channels, as many as there is room for."""
    fits = [p for p, most in SEATS.items() if channels % (p * LANES) == 0 and tiles * p <= most]
    return max(fits, default=1)


def _stages(block: int, steps: int) -> tuple[int, int]:
    """Steps in flight, and of these those whose weights are asked for before x.

    Weights that are on their way hold up x, the more the more rows of it there are.
    """
    if block > EIGHTS:
        return 8, 4
    return (12 if steps > 8 else 8), 6


def _or_null(x: Tensor | None) -> Tensor | int:
    return 0 if x is None else x


def _rows(x: Tensor, block: int) -> cuda.Argument:
    rows, C = x.shape
    return cuda.tensor_map(x, (C, rows), (2 * C,), (LANES, block))


def _blocks(weight: Tensor, *, gated: bool) -> cuda.Argument:
    """Blocks of 16 rows of W, two eights: every second one, or 8 of its first half and their gates.

    So a thread, which has a product's rows n and n + 8, has two neighbours or a value and its gate.
    """
    (rows, C), row = weight.shape, 2 * weight.shape[1]
    within, eight, block = (row, rows // 2 * row, 8 * row) if gated else (2 * row, row, 16 * row)
    return cuda.tensor_map(weight, (C, 8, 2, rows // 16), (within, eight, block), (LANES, 8, 2, 4))


def _outputs(weight: Tensor) -> cuda.Argument:
    """128 rows of W in such an order that a thread has products of eight neighbours."""
    (rows, C), row = weight.shape, 2 * weight.shape[1]
    sizes, strides = (C, 2, 4, 4, rows // 32), (row, 8 * row, 2 * row, 32 * row)
    return cuda.tensor_map(weight, sizes, strides, (LANES, 2, 4, 4, 4))


@cache
def _logits_kernel(
    block: int, channels: int, outputs: int, device: torch.device
) -> Callable[..., None]:
    stages = LOGITS_STAGES[block]
    shared = stages * (LOGITS + block) * LANES * 2 + 4 * block + 16 * stages + 1023
    text = logits_source(block, channels, outputs)
    return cuda.compile_kernel("product_logits", text, shared, device)


def logits_source(block: int, channels: int, outputs: int) -> str:
    """The text of `product_logits`."""
    shape: dict[str, int | bool | str] = {"ROWS": block, "C": channels, "N": outputs}
    shape |= {"STAGES": LOGITS_STAGES[block], "FIRST": LOGITS_FIRST}
    path = Path(__file__).with_name("product_logits.cu")
    return cuda.source_of([path], shape, (LOGITS,))


@cache
def _kernel(
    name: str,
    block: int,
    channels: int,
    parts: int,
    scratch: int,
    device: torch.device,
    **constants: int,
) -> Callable[..., None]:
    step, (stages, _) = (OUTPUTS + block) * LANES * 2, _stages(block, channels // parts // LANES)
    sums = block * WARPS * 64 if parts > 1 else 0
    shared = stages * step + sums + scratch + 8 * (2 * stages + 1) + 1023
    text = source(name, block, channels, parts, scratch, **constants)
    return cuda.compile_kernel(name, text, shared, device, parts)


def source(name: str, block: int, channels: int, parts: int, scratch: int, **constants: int) -> str:
    """The text of a kernel: `product_back`, `product_gated` or `product_side_by_side`."""
    files = [Path(__file__).with_name(file) for file in ("product.cuh", f"{name}.cu")]
    stages, first = _stages(block, channels // parts // LANES)
    shape = {"ROWS": block, "C": channels, "PARTS": parts, "SCRATCH": scratch}
    shape |= {"STAGES": stages, "FIRST": first}
    product = {"MULTIPLY": f"multiply_{block}"}
    return cuda.source_of(files, {**shape, **constants, **product}, (block,))
