"""y = x W^T of up to 128 rows, as sums over parts of the channels.

A projection back to the residual stream has few outputs: in tiles they are a quarter of
the programs that fill a GPU. Here each part of the channels has programs of its own, and
the norm that follows adds the parts up as it reads them, always in the same order.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.kernels import overlap
from based.ops.overlap import wait_for_previous
from based.ops.tensor_core import dot_add

# Channels of a step, most parts, and programs that a Hopper GPU runs side by side.
LANES, MOST_PARTS, PROGRAMS = 64, 8, 132
# Steps in flight: where shared memory holds six, and elsewhere.
DEEP, SHALLOW = {"STAGES": 6, "num_warps": 4}, {"STAGES": 3, "num_warps": 4}


class Division(NamedTuple):
    """Outputs of a program, and parts of the channels."""

    outputs: int
    parts: int


def divide(outputs: int, channels: int) -> Division | None:
    """What fills the GPU best; None where no division of these sizes has several parts."""
    found = [
        Division(tile, parts)
        for tile in (64, 32)
        for parts in range(2, MOST_PARTS + 1)
        if outputs % tile == 0
        and channels % (parts * LANES) == 0
        and outputs // tile * parts <= PROGRAMS
    ]
    # Of equally many programs, those with about four parts were the fastest.
    return max(
        found, key=lambda d: (outputs // d.outputs * d.parts, -abs(d.parts - 4)), default=None
    )


@triton.jit
@no_type_check
def _parts_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    counter_ptr,
    out_ptr,
    rows,
    C: tl.constexpr,
    N: tl.constexpr,
    SHARE: tl.constexpr,
    BIAS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    n, row = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    lane = part * SHARE + tl.arange(0, BLOCK_C)
    # Rows that are not there are the last one again: no load needs a mask.
    x = x_ptr + tl.minimum(row, rows - 1)[:, None] * C + lane[None, :]
    weight = weight_ptr + n[:, None] * C + lane[None, :]
    wait_for_previous(OVERLAP)
    y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for channel in tl.range(0, SHARE, BLOCK_C, num_stages=STAGES):
        y = dot_add(tl.load(x + channel), tl.trans(tl.load(weight + channel)), y, "tf32")
    if BIAS and part == 0:
        y += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    out = out_ptr + (part * rows + row)[:, None] * N + n[None, :]
    tl.store(out, y, mask=(row < rows)[:, None])
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
    (rows, C), N = x.shape, weight.shape[0]
    out = torch.empty((division.parts, rows, N), dtype=torch.float32, device=x.device)
    deep = not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9
    _parts_kernel[(N // division.outputs, division.parts)](
        x,
        weight,
        out if bias is None else bias,
        out if counter is None else counter,
        out,
        rows,
        C=C,
        N=N,
        SHARE=C // division.parts,
        BIAS=bias is not None,
        COUNT=counter is not None,
        BLOCK_R=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=division.outputs,
        BLOCK_C=LANES,
        **overlap(x),
        **(DEEP if deep else SHALLOW),
    )
    return out
