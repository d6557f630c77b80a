"""y = x W^T of up to 128 rows, in tiles on tensor cores, with what follows it.

A projection to gated channels has its gate, or convolution, in its tiles. One back to the
residual stream has few outputs, a quarter of the tiles that fill a GPU: there each part
of the channels has programs of its own, and the norm that follows adds the parts up as it
reads them, always in the same order.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.few_rows_linear.decode import side_by_side, weight_of
from based.ops.few_rows_linear.projections import WIDE
from based.ops.kernels import overlap
from based.ops.overlap import let_next_start, only_wait
from based.ops.tensor_core import dot_add

# Channels of a step, rows of W of a program, most parts, and programs that a Hopper GPU runs
# side by side.
LANES, TILES, MOST_PARTS, PROGRAMS = 64, (64, 32), 8, 132
# Steps in flight: where shared memory holds six, and elsewhere. A wide residual stream is faster
# with as many, by rows, as leave a multiprocessor to one program.
DEEP, SHALLOW, LAUNCH = 6, 3, {"num_warps": 4}
DEEPER = {16: 12, 32: 10, 64: 8, 128: 7}
# Bytes of shared memory of half a multiprocessor.
HALF = 113 * 1024
# Rows of a product that tensor cores want, and to how many x is padded where outputs are these:
# elsewhere, and where they are parts of a sum.
WHOLE, FEW, FEW_OF_PARTS = 64, (16, 32), (16, 32, 128)


class Division(NamedTuple):
    """Rows of W of a program, and parts of the channels."""

    outputs: int
    parts: int


def divide(outputs: int, channels: int) -> Division | None:
    """What fills the GPU best; None where no division of these sizes has several parts."""
    found = [
        Division(tile, parts)
        for tile in TILES
        for parts in range(2, MOST_PARTS + 1)
        if outputs % tile == 0
        and channels % (parts * LANES) == 0
        and outputs // tile * parts <= PROGRAMS
    ]
    # Of equally many programs, those with about four parts were the fastest.
    return max(
        found, key=lambda d: (outputs // d.outputs * d.parts, -abs(d.parts - 4)), default=None
    )


def whole_tile(channels: int, *outputs: int) -> int | None:
    """Rows of each W of a program where channels are not divided; None if no tile fits."""
    fits = [t for t in TILES if channels % LANES == 0 and not any(n % t for n in outputs)]
    full = [tile for tile in fits if sum(outputs) // tile <= PROGRAMS]
    return min(full, default=max(fits, default=None))


@triton.jit
@no_type_check
def _tile_kernel(
    x_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    bias_ptr,
    taps_ptr,
    past_ptr,
    counter_ptr,
    out_ptr,
    rows,
    C: tl.constexpr,
    N: tl.constexpr,
    SHARE: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    TURNED: tl.constexpr,
    ALONE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program that is ALONE on its multiprocessor loses nothing to a next one that waits."""
    tile, part = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    if GATED:
        # A value's and its gate's column are neighbours, and so are in one thread.
        OUTPUTS: tl.constexpr = BLOCK_N // 2
        source = tile * OUTPUTS + column // 2 + column % 2 * N
    else:
        OUTPUTS: tl.constexpr = BLOCK_N
        source = tile * OUTPUTS + column
    n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    lane = part * SHARE + tl.arange(0, BLOCK_C)
    # Rows that are not there are the last one again: no load needs a mask.
    x = x_ptr + tl.minimum(row, rows - 1)[:, None] * C + lane[None, :]
    weight = weight_of(first_ptr, second_ptr, third_ptr, tile * OUTPUTS, C, N, SECOND, THIRD)
    weight += source[:, None] * C + lane[None, :]
    given = (row < rows)[:, None]
    # Weights, and a past that only this kernel moves on, are on their way before it waits.
    if BIAS:
        shift = tl.load(bias_ptr + n).to(tl.float32)[None, :]
        if GATED:
            gate_shift = tl.load(bias_ptr + N + n).to(tl.float32)[None, :]
    if ALONE:
        let_next_start(OVERLAP)
    if WIDTH > 0:
        newest_tap = tl.load(taps_ptr + n * WIDTH + WIDTH - 1).to(tl.float32)[None, :]
    if WIDTH > 1:
        slot = tl.arange(0, SLOTS)[None, None, :]
        held, channel = slot < WIDTH - 1, n[None, :, None]
        taps = tl.load(taps_ptr + channel * WIDTH + slot, mask=held, other=0.0).to(tl.float32)
        past = past_ptr + (row[:, None, None] * (WIDTH - 1) + slot) * N + channel
        older = tl.load(past, mask=held & given[:, :, None], other=0.0)
    only_wait(OVERLAP)
    if TURNED:
        left, right = weight, x
    else:
        left, right = x, weight
    y = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    for channel in tl.range(0, SHARE, BLOCK_C, num_stages=STAGES):
        y = dot_add(tl.load(left + channel), tl.trans(tl.load(right + channel)), y, "tf32")
    if TURNED:
        y = tl.trans(y)
    if not ALONE:
        let_next_start(OVERLAP)
    if GATED:
        y, gate = tl.split(tl.reshape(y, (BLOCK_R, OUTPUTS, 2)))
        if BIAS:
            gate += gate_shift
    if BIAS and part == 0:
        y += shift
    if WIDTH > 0:
        newest = y.to(past_ptr.dtype.element_ty)
        y = newest.to(tl.float32) * newest_tap
        if WIDTH > 1:
            y += tl.sum(older.to(tl.float32) * taps, axis=2)
            # Slots move down, once every thread has read what they replace.
            tl.debug_barrier()
            tl.store(past - N, older, mask=held & (slot > 0) & given[:, :, None])
            last = past_ptr + (row[:, None] * (WIDTH - 1) + WIDTH - 2) * N + n[None, :]
            tl.store(last, newest, mask=given)
        y *= tl.sigmoid(y) * gate
    elif GATED:
        y *= gate * tl.sigmoid(gate)
    out = out_ptr + (part * rows + row)[:, None] * N + n[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=given)
    if COUNT and (tile == 0) & (part == 0):
        real = row < rows
        tl.store(counter_ptr + row, tl.load(counter_ptr + row, mask=real) + 1, mask=real)


def parts_kernel(
    x: Float[Tensor, "B C"],
    weight: Float[Tensor, "N C"],
    bias: Float[Tensor, " N"] | None,
    counter: Int[Tensor, " B"] | None,
    division: Division,
) -> Float[Tensor, "S B N"]:
    """The parts of x's projection, float32, the first one with the bias.

    All tensors are contiguous; `counter` is advanced by one.
    """
    shape = (division.parts, x.shape[0], weight.shape[0])
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(x, [weight], out, division, bias=bias, counter=counter)
    return out


def gated_kernel(
    x: Float[Tensor, "B C"],
    weight: Float[Tensor, "NN C"],
    bias: Float[Tensor, " NN"] | None,
    taps: Float[Tensor, "N W"] | None,
    past: Float[Tensor, "B P N"] | None,
    tile: int,
) -> Float[Tensor, "B N"]:
    """The first half of x's projection by silu of the second; with taps silu(conv) by the second.

    All tensors are contiguous; `past` moves on by one token, in place.
    """
    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(x, [weight], out, Division(tile, 1), bias=bias, taps=taps, past=past)
    return out


def side_by_side_kernel(
    x: Float[Tensor, "B C"], weights: Sequence[Float[Tensor, "_ C"]], tile: int
) -> Float[Tensor, "B N"]:
    """x's projections by up to three weights, each a multiple of `tile` outputs."""
    N = sum(weight.shape[0] for weight in weights)
    out = torch.empty((x.shape[0], N), dtype=x.dtype, device=x.device)
    _launch(x, weights, out, Division(tile, 1))
    return out


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    out: Tensor,
    division: Division,
    bias: Tensor | None = None,
    taps: Tensor | None = None,
    past: Tensor | None = None,
    counter: Tensor | None = None,
) -> None:
    (rows, C), N = x.shape, out.shape[-1]
    rows_of_w = sum(weight.shape[0] for weight in weights)
    three, second, third = side_by_side(weights, N)
    block_r, share = max(16, 1 << (rows - 1).bit_length()), C // division.parts
    stages, width = _stages(x, block_r, min(C, N)), 0 if taps is None else taps.shape[1]
    turned = block_r in (FEW_OF_PARTS if division.parts > 1 else FEW)
    held = stages * (block_r + division.outputs) * LANES * x.element_size()
    _tile_kernel[(rows_of_w // division.outputs, division.parts)](
        x,
        *three,
        out if bias is None else bias,
        out if taps is None else taps,
        out if past is None else past,
        out if counter is None else counter,
        out,
        rows,
        C=C,
        N=N,
        SHARE=share,
        SECOND=second,
        THIRD=third,
        BIAS=bias is not None,
        GATED=rows_of_w > N,
        WIDTH=width,
        SLOTS=triton.next_power_of_2(max(1, width - 1)),
        COUNT=counter is not None,
        BLOCK_R=block_r,
        BLOCK_N=division.outputs,
        BLOCK_C=LANES,
        STAGES=stages,
        TURNED=turned and division.outputs >= WHOLE,
        ALONE=held > HALF,
        **overlap(x, reads_state=past is not None),
        **LAUNCH,
    )


def _stages(x: Tensor, block_r: int, width: int) -> int:
    """Steps in flight of a program, in a model whose residual stream is so wide."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        return SHALLOW
    return DEEPER[block_r] if width >= WIDE else DEEP
