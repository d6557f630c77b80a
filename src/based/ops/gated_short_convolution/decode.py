"""One token of a short convolution: taps, bias, SiLU, gate and the shift of the state."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from based.ops.kernels import overlap
from based.ops.overlap import wait_for_previous

# Rows and channels of a program; many rows share what they load of the weight.
FEW, MANY, MANY_ROWS = (1, 1024), (8, 128), 64
LAUNCH = {"num_warps": 4}


@triton.jit
@no_type_check
def _convolution_step_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    past_ptr,
    out_ptr,
    x_stride,
    gate_stride,
    rows,
    channels,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, cell = channel < channels, channel[None, :]
    real = (row < rows) & inside[None, :]
    past = past_ptr + row * (WIDTH - 1) * channels + cell
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + cell, mask=real, other=0.0)
    weight = weight_ptr + channel * WIDTH
    tap = tl.load(weight + WIDTH - 1, mask=inside, other=0.0).to(tl.float32)
    y = x.to(tl.float32) * tap[None, :]
    for back in tl.static_range(WIDTH - 1):
        older = tl.load(past + back * channels, mask=real, other=0.0)
        tap = tl.load(weight + back, mask=inside, other=0.0).to(tl.float32)
        y += older.to(tl.float32) * tap[None, :]
        # Slots move down one by one, each after every thread has read what it replaces.
        tl.debug_barrier()
        if back > 0:
            tl.store(past + (back - 1) * channels, older, mask=real)
    if WIDTH > 1:
        tl.store(past + (WIDTH - 2) * channels, x, mask=real)
    if BIAS:
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    y *= tl.sigmoid(y)
    if GATED:
        gate = tl.load(gate_ptr + row * gate_stride + cell, mask=real, other=0.0)
        y *= gate.to(tl.float32)
    tl.store(out_ptr + row * channels + cell, y, mask=real)


def convolution_step_kernel(
    x: Float[Tensor, "B C"],
    gate: Float[Tensor, "B C"] | None,
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "B W-1 C"],
    bias: Float[Tensor, " C"] | None = None,
) -> Float[Tensor, "B C"]:
    """y = silu(conv(x) + bias) * gate; `past` moves on by one token, in place.

    x and gate may be slices of a projection; weight and past are contiguous.
    """
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    block_r, block_c = MANY if rows >= MANY_ROWS else FEW
    _convolution_step_kernel[(triton.cdiv(rows, block_r), triton.cdiv(channels, block_c))](
        x,
        x if gate is None else gate,
        weight,
        weight if bias is None else bias,
        past,
        out,
        x.stride(0),
        x.stride(0) if gate is None else gate.stride(0),
        rows,
        channels,
        WIDTH=weight.shape[1],
        GATED=gate is not None,
        BIAS=bias is not None,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        **overlap(x),
        **LAUNCH,
    )
    return out
