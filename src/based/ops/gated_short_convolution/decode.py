"""One token of the gated short convolution: taps, SiLU, gate and the shift of the state."""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 1024
LAUNCH = {"BLOCK_C": BLOCK, "num_warps": 4}


@triton.jit
@no_type_check
def _convolution_step_kernel(
    projected_ptr,
    weight_ptr,
    past_ptr,
    out_ptr,
    row_stride,
    channels,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    past = past_ptr + row * (WIDTH - 1) * channels + channel
    projected = projected_ptr + row * row_stride + channel
    x = tl.load(projected, mask=real, other=0.0)
    gate = tl.load(projected + channels, mask=real, other=0.0).to(tl.float32)
    weight = weight_ptr + channel * WIDTH
    tap = tl.load(weight + WIDTH - 1, mask=real, other=0.0).to(tl.float32)
    y = x.to(tl.float32) * tap
    for back in tl.static_range(WIDTH - 1):
        older = tl.load(past + back * channels, mask=real, other=0.0)
        y += older.to(tl.float32) * tl.load(weight + back, mask=real, other=0.0).to(tl.float32)
        # Slots move down one by one, each after every thread has read what it replaces.
        tl.debug_barrier()
        if back > 0:
            tl.store(past + (back - 1) * channels, older, mask=real)
    if WIDTH > 1:
        tl.store(past + (WIDTH - 2) * channels, x, mask=real)
    y = y * tl.sigmoid(y) * gate
    tl.store(out_ptr + row * channels + channel, y, mask=real)


def convolution_step_kernel(
    projected: Float[Tensor, "B CC"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "B W-1 C"],
) -> Float[Tensor, "B C"]:
    """y = silu(conv(x)) * gate; `past` moves on by one token, in place.

    The projection's channels are neighbours; weight and past are contiguous.
    """
    rows, channels = projected.shape[0], weight.shape[0]
    out = projected.new_empty(rows, channels)
    _convolution_step_kernel[(rows, triton.cdiv(channels, BLOCK))](
        projected,
        weight,
        past,
        out,
        projected.stride(0),
        channels,
        WIDTH=weight.shape[1],
        **LAUNCH,
    )
    return out
