"""One pass forward, one back: a program walks a stretch of one row's tokens for some channels.

A token's input is read once from memory and W times from cache. The backward pass
computes the gradients before the activation anew where a later token needs them.
"""

import triton
import triton.language as tl


@triton.jit
def forward(
    x, weight, bias, gate, y, x_b, x_t, gate_b, gate_t, weight_b, weight_c, weight_w, bias_b, T, C,
    W: tl.constexpr, SILU: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A stretch of outputs. Grid: rows, blocks of channels, stretches."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(2) * STRETCH
    taps = weight + row * weight_b + channel * weight_c
    x += row * x_b
    for first in range(begin, min(begin + STRETCH, T), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        z = _convolved(x, taps, weight_w, bias, row * bias_b, t, channel, x_t, T, C, W)
        inside = (t[:, None] < T) & (channel[None, :] < C)
        out = z
        if SILU:
            out *= tl.sigmoid(z)
        if gate is not None:
            out *= _inputs(gate + row * gate_b, t, channel, gate_t, T, C)
            out += _inputs(x, t, channel, x_t, T, C)
        at = y + (row * T + t[:, None]) * C + channel[None, :]
        tl.store(at, out.to(y.dtype.element_ty), inside)


@triton.jit
def backward(
    x, weight, bias, gate, dy, dx, d_weight, d_bias, d_gate,
    x_b, x_t, gate_b, gate_t, weight_b, weight_c, weight_w, bias_b, T, C,
    W: tl.constexpr, SILU: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A stretch's input gradients and its part of those of weight and bias. `forward`'s grid."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, real = tl.program_id(2) * STRETCH, channel < C
    taps = weight + row * weight_b + channel * weight_c
    x += row * x_b
    dy += row * T * C
    if gate is not None:
        gate += row * gate_b
    place = tl.arange(0, W_BLOCK)
    to_taps = tl.zeros((BLOCK_C, W_BLOCK), tl.float32)
    for first in range(begin, min(begin + STRETCH, T), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        z = _convolved(x, taps, weight_w, bias, row * bias_b, t, channel, x_t, T, C, W)
        out = _inputs(dy, t, channel, C, T, C)
        d_z = _before(z, out, gate, gate_t, t, channel, T, C, SILU)
        inside = (t[:, None] < T) & real[None, :]
        at = (row * T + t[:, None]) * C + channel[None, :]
        d_x = d_z * tl.load(taps + (W - 1) * weight_w, real, 0.0).to(tl.float32)[None, :]
        if gate is not None:
            d_x += out
            tl.store(d_gate + at, (out * z).to(d_gate.dtype.element_ty), inside)
        for j in tl.static_range(W):
            seen = _inputs(x, t - (W - 1) + j, channel, x_t, T, C)
            to_taps += tl.where(place[None, :] == j, tl.sum(d_z * seen, 0)[:, None], 0.0)
        to_taps += tl.where(place[None, :] == W, tl.sum(d_z, 0)[:, None], 0.0)
        for j in tl.static_range(W - 1):
            later = t + (W - 1) - j
            z = _convolved(x, taps, weight_w, bias, row * bias_b, later, channel, x_t, T, C, W)
            out = _inputs(dy, later, channel, C, T, C)
            d_z = _before(z, out, gate, gate_t, later, channel, T, C, SILU)
            d_x += d_z * tl.load(taps + j * weight_w, real, 0.0).to(tl.float32)[None, :]
        tl.store(dx + at, d_x.to(dx.dtype.element_ty), inside)
    part = (row * tl.num_programs(2) + tl.program_id(2)) * C + channel
    at = d_weight + part[:, None] * W + place[None, :]
    tl.store(at, to_taps, real[:, None] & (place[None, :] < W))
    tl.store(d_bias + part, tl.sum(tl.where(place[None, :] == W, to_taps, 0.0), 1), real)


# The W taps and the bias beside each other: a power of two.
W_BLOCK = tl.constexpr(16)


@triton.jit
def _inputs(x, t, channel, T_STRIDE, T, C):
    """Rows t, float32; zeros outside."""
    inside = (t[:, None] >= 0) & (t[:, None] < T) & (channel[None, :] < C)
    at = x + t[:, None].to(tl.int64) * T_STRIDE + channel[None, :]
    return tl.load(at, inside, 0.0).to(tl.float32)


@triton.jit
def _convolved(x, taps, TAP_STRIDE, bias, bias_at, t, channel, T_STRIDE, T, C, W: tl.constexpr):
    """conv(x)_t + bias."""
    real = channel < C
    z = tl.zeros((t.shape[0], channel.shape[0]), tl.float32)
    for j in tl.static_range(W):
        tap = tl.load(taps + j * TAP_STRIDE, real, 0.0).to(tl.float32)
        z += tap[None, :] * _inputs(x, t - (W - 1) + j, channel, T_STRIDE, T, C)
    if bias is not None:
        z += tl.load(bias + bias_at + channel, real, 0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _before(z, dy, gate, gate_t, t, channel, T, C, SILU: tl.constexpr):
    """The gradient of z, from that of what becomes of it."""
    if SILU:
        share = tl.sigmoid(z)
        dy *= share * (1 + z * (1 - share))
    if gate is not None:
        dy *= _inputs(gate, t, channel, gate_t, T, C)
    return dy
