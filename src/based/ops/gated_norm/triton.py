"""One pass forward, one back: a program walks a stretch of one row's tokens, some at a time.

Only the inputs are kept; the backward pass computes the gate and the norm anew. Strides
of tokens are constants, so that the compiler sees which widths allow loads of 16 bytes.
"""

import triton
import triton.language as tl

from based.ops.row_norm.triton import normed


@triton.jit
def forward(
    y, u, z, skip, weight, out, y_b, u_b, z_b, skip_b, weight_b, T, C, P, eps,
    Y_T: tl.constexpr, U_T: tl.constexpr, Z_T: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A stretch of outputs. Grid: rows, stretches."""
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * STRETCH
    channel = tl.arange(0, BLOCK_C)
    real = (channel < C)[None, :]
    d, w = _weights(skip + row * skip_b, weight + row * weight_b, channel, C, P)
    y, u, z, out = y + row * y_b, u + row * u_b, z + row * z_b, out + row * T * C
    for first in range(begin, min(begin + STRETCH, T), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        gate = _tokens(z, Z_T, t, channel, T, C)
        mixed = _tokens(y, Y_T, t, channel, T, C) + d * _tokens(u, U_T, t, channel, T, C)
        unit, _ = normed(mixed * gate * tl.sigmoid(gate), real, C, eps, False)
        _store(out, unit * w, t, channel, T, C)


@triton.jit
def backward(
    y, u, z, skip, weight, d_out, d_y, d_u, d_z, d_skip, d_weight,
    y_b, u_b, z_b, skip_b, weight_b, T, C, P, eps,
    Y_T: tl.constexpr, U_T: tl.constexpr, Z_T: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A stretch's gradients of y, u and z, and its part of the others'. `forward`'s grid."""
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * STRETCH
    channel = tl.arange(0, BLOCK_C)
    real = (channel < C)[None, :]
    d, w = _weights(skip + row * skip_b, weight + row * weight_b, channel, C, P)
    y, u, z, d_out = y + row * y_b, u + row * u_b, z + row * z_b, d_out + row * T * C
    d_y, d_u, d_z = d_y + row * T * C, d_u + row * T * C, d_z + row * T * C
    to_skip, to_weight = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, min(begin + STRETCH, T), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        gate, skipped = _tokens(z, Z_T, t, channel, T, C), _tokens(u, U_T, t, channel, T, C)
        mixed = _tokens(y, Y_T, t, channel, T, C) + d * skipped
        share = tl.sigmoid(gate)
        unit, scale = normed(mixed * gate * share, real, C, eps, False)
        given = _tokens(d_out, C, t, channel, T, C)
        to_weight += tl.sum(given * unit, 0)
        to_unit = given * w
        to_gated = scale * (to_unit - unit * (tl.sum(to_unit * unit, 1) / C)[:, None])
        to_mixed = to_gated * gate * share
        to_skip += tl.sum(to_mixed * skipped, 0)
        _store(d_y, to_mixed, t, channel, T, C)
        _store(d_u, to_mixed * d, t, channel, T, C)
        _store(d_z, to_gated * mixed * share * (1 + gate * (1 - share)), t, channel, T, C)
    part = (row * tl.num_programs(1) + tl.program_id(1)) * C + channel
    tl.store(d_skip + part, to_skip, channel < C)
    tl.store(d_weight + part, to_weight, channel < C)


@triton.jit
def _weights(skip, weight, channel, C, P):
    """A row's skip and norm weight for every channel, float32."""
    d = tl.load(skip + channel // P, channel < C, 0.0).to(tl.float32)
    w = tl.load(weight + channel, channel < C, 0.0).to(tl.float32)
    return d[None, :], w[None, :]


@triton.jit
def _tokens(x, T_STRIDE, t, channel, T, C):
    """Rows t, float32; zeros outside."""
    inside = (t[:, None] < T) & (channel[None, :] < C)
    at = x + t[:, None].to(tl.int64) * T_STRIDE + channel[None, :]
    return tl.load(at, inside, 0.0).to(tl.float32)


@triton.jit
def _store(x, values, t, channel, T, C):
    """Writes rows t of a contiguous tensor."""
    inside = (t[:, None] < T) & (channel[None, :] < C)
    at = x + t[:, None].to(tl.int64) * C + channel[None, :]
    tl.store(at, values.to(x.dtype.element_ty), inside)
