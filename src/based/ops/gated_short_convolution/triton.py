"""The whole sequence as Triton kernels: one pass forward, one pass back.

A program walks a stretch of one row's tokens for a block of channels, GROUP tokens at
a time: first it loads all that they need, so that enough bytes are on their way, then
it computes. The backward pass walks from a stretch's end to its begin, because a
token's input gradient needs the gradients behind the SiLU of the next W - 1 tokens;
these it computes again for the tokens just beyond the end.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.packed import positions, sequence_ids

# Two rounds of the largest GPUs' multiprocessors, four programs on each.
PROGRAMS = 1024


class Walk(NamedTuple):
    """How a kernel's programs share the work."""

    BLOCK: int
    GROUP: int
    num_warps: int
    longest: int

    def length(self, rows: int, tokens: int, channels: int) -> int:
        """Tokens of a stretch: the fewer, the more programs; never less than two groups."""
        length, blocks = self.longest, rows * triton.cdiv(channels, self.BLOCK)
        while length > 2 * self.GROUP and blocks * triton.cdiv(tokens, length) < PROGRAMS:
            length //= 2
        return length


FORWARD = Walk(BLOCK=512, GROUP=8, num_warps=4, longest=16)
# Longer: each stretch leaves a part of the weight's gradient, and computes W - 1 tokens twice.
BACKWARD = Walk(BLOCK=512, GROUP=4, num_warps=4, longest=128)


@triton.jit
def load_rows(base, stride, first, limit, real, COUNT: tl.constexpr):
    """COUNT rows from `first` on, [BLOCK] each; zeros before row 0 and from `limit` on."""
    rows, base = (), base + first.to(tl.int64) * stride
    for i in tl.static_range(COUNT):
        inside = real & (first + i >= 0) & (first + i < limit)
        rows += (tl.load(base + i * stride, mask=inside, other=0.0),)
    return rows


@triton.jit
def load_taps(weight_ptr, channel, real, W: tl.constexpr):
    """The W taps of each channel, oldest input's first, [BLOCK] each, float32."""
    taps = ()
    for j in tl.static_range(W):
        tap = tl.load(weight_ptr + channel * W + j, mask=real, other=0.0)
        taps += (tap.to(tl.float32),)
    return taps


@triton.jit
def place_of(token, limit, position_ptr, sequence_ptr):
    """A packed token's position in its own sequence, and which sequence that is."""
    position = tl.load(position_ptr + token, mask=token < limit, other=0).to(tl.int32)
    return position, tl.load(sequence_ptr + token, mask=token < limit, other=0)


@triton.jit
def convolve(
    taps,
    rows,
    place: tl.constexpr,  # of the token's oldest input among the rows
    position,
    past,  # of the token's sequence
    channels,
    real,
    W: tl.constexpr,
    HAS_PAST: tl.constexpr,
    PACKED: tl.constexpr,
):
    """sum_j tap_j x_j, [BLOCK], and the W inputs x_j themselves, oldest first; float32."""
    total, seen = 0.0, ()
    for j in tl.static_range(W):
        x = rows[place + j].to(tl.float32)
        if (HAS_PAST or PACKED) and j < W - 1:
            own = position >= W - 1 - j
            before = 0.0
            if HAS_PAST:
                slot = past + (position + j) * channels
                before = tl.load(slot, mask=real & (own == 0), other=0.0).to(tl.float32)
            x = tl.where(own, x, before)
        total += taps[j] * x
        seen += (x,)
    return total, seen


@triton.jit
def convolution_forward(
    projected_ptr,
    weight_ptr,
    past_ptr,
    position_ptr,
    sequence_ptr,
    out_ptr,
    row_stride,
    token_stride,
    T,
    channels,
    length,
    W: tl.constexpr,
    HAS_PAST: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A stretch of outputs. Grid: channel blocks, stretches and rows, in that order of speed."""
    blocks, stretches = tl.cdiv(channels, BLOCK), tl.cdiv(T, length)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = program // blocks % stretches * length
    row = (program // blocks // stretches).to(tl.int64)
    real = channel < channels
    inputs = projected_ptr + row * row_stride + channel
    taps = load_taps(weight_ptr, channel, real, W)
    for group in range(length // GROUP):
        first = begin + group * GROUP
        rows = load_rows(inputs, token_stride, first - (W - 1), T, real, GROUP + W - 1)
        gates = load_rows(inputs + channels, token_stride, first, T, real, GROUP)
        out = out_ptr + (row * T + first) * channels + channel
        for i in tl.static_range(GROUP):
            token = first + i
            position, sequence = token, row
            if PACKED:
                position, sequence = place_of(token, T, position_ptr, sequence_ptr)
            past = past_ptr + sequence * (W - 1) * channels + channel
            y, _ = convolve(taps, rows, i, position, past, channels, real, W, HAS_PAST, PACKED)
            y = y * tl.sigmoid(y) * gates[i].to(tl.float32)
            tl.store(out + i * channels, y, mask=real & (token < T))


@triton.jit
def convolution_backward(
    projected_ptr,
    weight_ptr,
    past_ptr,
    position_ptr,
    sequence_ptr,
    d_out_ptr,
    d_projected_ptr,
    d_past_ptr,
    d_weight_ptr,  # [B * stretches, C, W]: a part from each
    row_stride,
    token_stride,
    d_row_stride,
    d_token_stride,
    T,
    channels,
    length,
    W: tl.constexpr,
    HAS_PAST: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradients of a stretch of inputs and gates, and its part of the weight's. Grid as above."""
    blocks, stretches = tl.cdiv(channels, BLOCK), tl.cdiv(T, length)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = program // blocks % stretches * length
    row = (program // blocks // stretches).to(tl.int64)
    real = channel < channels
    end = tl.minimum(begin + length, T)
    limit = tl.minimum(begin + length + W - 1, T)
    inputs = projected_ptr + row * row_stride + channel
    d_out = d_out_ptr + row * d_row_stride + channel
    taps = load_taps(weight_ptr, channel, real, W)
    # Gradients behind the SiLU of the tokens after the present one, and sums over tokens.
    later, totals = (), ()
    for j in tl.static_range(W):
        totals += (tl.zeros([BLOCK], tl.float32),)
        if j < W - 1:
            later += (tl.zeros([BLOCK], tl.float32),)
    groups = length // GROUP + (W + GROUP - 2) // GROUP
    for group in range(groups):
        first = begin + (groups - 1 - group) * GROUP
        rows = load_rows(inputs, token_stride, first - (W - 1), limit, real, GROUP + W - 1)
        gates = load_rows(inputs + channels, token_stride, first, limit, real, GROUP)
        d_outs = load_rows(d_out, d_token_stride, first, limit, real, GROUP)
        d_inputs = d_projected_ptr + (row * T + first) * 2 * channels + channel
        for i in tl.static_range(GROUP - 1, -1, -1):
            token = first + i
            position, sequence = token, row
            if PACKED:
                position, sequence = place_of(token, limit, position_ptr, sequence_ptr)
            past = past_ptr + sequence * (W - 1) * channels + channel
            y, seen = convolve(taps, rows, i, position, past, channels, real, W, HAS_PAST, PACKED)
            s, d = tl.sigmoid(y), d_outs[i].to(tl.float32)
            y *= s
            mine = token < end
            place = d_inputs + i * 2 * channels
            tl.store(place + channels, d * y, mask=real & mine)
            d *= gates[i].to(tl.float32) * (s + y * (1 - s))
            reached = (d,)
            reached += later
            d_x = taps[W - 1] * d
            d = tl.where(mine, d, 0.0)
            sums = ()
            for j in tl.static_range(W):
                if j > 0:
                    d_x += taps[W - 1 - j] * reached[j]
                sums += (totals[j] + d * seen[j],)
            totals = sums
            tl.store(place, d_x, mask=real & mine)
            if HAS_PAST:
                starts = real & mine & (position == 0)
                for slot in tl.static_range(W - 1):
                    d_before = taps[slot] * reached[0]
                    for after in tl.static_range(1, slot + 1):
                        d_before += taps[slot - after] * reached[after]
                    d_past = d_past_ptr + (sequence * (W - 1) + slot) * channels + channel
                    tl.store(d_past, d_before, mask=starts)
            kept = ()
            for j in tl.static_range(W - 1):
                # What follows a sequence's first token reaches nothing before it.
                d = tl.where(position == 0, 0.0, reached[j]) if PACKED else reached[j]
                kept += (d,)
            later = kept
    part = d_weight_ptr + ((row * stretches + begin // length) * channels + channel) * W
    for j in tl.static_range(W):
        tl.store(part + j, totals[j], mask=real)


def forward(
    projected: Float[Tensor, "B T CC"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "N W-1 C"] | None,
    cu_seqlens: Int[Tensor, " E"] | None,
) -> Float[Tensor, "B T C"]:
    """See `operator.py`; any strides, read in place where channels are neighbours."""
    B, T, C = projected.shape[0], projected.shape[1], weight.shape[0]
    length = FORWARD.length(B, T, C)
    out = projected.new_empty(B, T, C)
    operands, constants = _operands(projected, weight, past, cu_seqlens)
    convolution_forward[(triton.cdiv(C, FORWARD.BLOCK) * triton.cdiv(T, length) * B,)](
        *operands,
        out,
        *operands[0].stride()[:2],
        T,
        C,
        length,
        **constants,
        **_launch(FORWARD),
    )
    return out


def backward(
    projected: Float[Tensor, "B T CC"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "N W-1 C"] | None,
    cu_seqlens: Int[Tensor, " E"] | None,
    d_out: Float[Tensor, "B T C"],
) -> tuple[Float[Tensor, "B T CC"], Float[Tensor, "C W"], Float[Tensor, "N W-1 C"] | None]:
    """Gradients of the first three, contiguous and in their dtypes."""
    B, T, C = d_out.shape
    length = BACKWARD.length(B, T, C)
    stretches = triton.cdiv(T, length)
    d_projected = projected.new_empty(projected.shape)
    # Sequences without tokens have no program.
    d_past = None if past is None else torch.zeros_like(past, memory_format=torch.contiguous_format)
    parts = weight.new_empty((B * stretches, *weight.shape), dtype=torch.float32)
    operands, constants = _operands(projected, weight, past, cu_seqlens)
    d_out = _neighbours(d_out)
    convolution_backward[(triton.cdiv(C, BACKWARD.BLOCK) * stretches * B,)](
        *operands,
        d_out,
        d_projected,
        d_projected if d_past is None else d_past,
        parts,
        *operands[0].stride()[:2],
        *d_out.stride()[:2],
        T,
        C,
        length,
        **constants,
        **_launch(BACKWARD),
    )
    return d_projected, parts.sum(0).to(weight.dtype), d_past


def _operands(
    projected: Tensor, weight: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[list[Tensor], dict[str, Any]]:
    """What both kernels read, and which of it; the projection stands for what they do not."""
    projected = _neighbours(projected)
    has_past = past is not None and past.numel() > 0
    where = [projected, projected]
    if cu_seqlens is not None:
        T = projected.shape[1]
        where = [positions(cu_seqlens, T), sequence_ids(cu_seqlens, T)]
    operands = [projected, weight.contiguous(), past.contiguous() if has_past else projected]
    constants = {"W": weight.shape[1], "HAS_PAST": has_past, "PACKED": cu_seqlens is not None}
    return [*operands, *where], constants


def _launch(walk: Walk) -> dict[str, Any]:
    return {"BLOCK": walk.BLOCK, "GROUP": walk.GROUP, "num_warps": walk.num_warps}


def _neighbours(x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
    """With channels beside each other; copied only if need be."""
    return x if x.stride(2) == 1 else x.contiguous()
