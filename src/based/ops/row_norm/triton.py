"""A program norms a stretch of one row's tokens, some at a time; only x is kept for later."""

import triton
import triton.language as tl


@triton.jit
def forward(
    x, weight, bias, y, T, C, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: rows, stretches."""
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * STRETCH
    channel = tl.arange(0, BLOCK_C)
    real = channel < C
    w = tl.load(weight + row * C + channel, real, 0.0).to(tl.float32)[None, :]
    if CENTRED:
        b = tl.load(bias + row * C + channel, real, 0.0).to(tl.float32)[None, :]
    for first in range(begin, min(begin + STRETCH, T), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < T) & real[None, :]
        at = (row * T + t[:, None]) * C + channel[None, :]
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        unit, _ = normed(values, inside, C, eps, CENTRED)
        out = unit * w
        if CENTRED:
            out += b
        if RESIDUAL:
            out += values
        tl.store(y + at, out.to(y.dtype.element_ty), inside)


@triton.jit
def backward(
    x, weight, dy, dx, d_weight, d_bias, T, C, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A stretch's gradients of x, and its part of those of weight and bias. `forward`'s grid."""
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * STRETCH
    channel = tl.arange(0, BLOCK_C)
    real = channel < C
    w = tl.load(weight + row * C + channel, real, 0.0).to(tl.float32)[None, :]
    to_weight, to_bias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, min(begin + STRETCH, T), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < T) & real[None, :]
        at = (row * T + t[:, None]) * C + channel[None, :]
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        out = tl.load(dy + at, inside, 0.0).to(tl.float32)
        unit, scale = normed(values, inside, C, eps, CENTRED)
        to_weight += tl.sum(out * unit, 0)
        to_bias += tl.sum(out, 0)
        to_unit = out * w
        d_x = to_unit - unit * (tl.sum(to_unit * unit, 1) / C)[:, None]
        if CENTRED:
            d_x -= (tl.sum(to_unit, 1) / C)[:, None]
        d_x *= scale
        if RESIDUAL:
            d_x += out
        tl.store(dx + at, d_x.to(dx.dtype.element_ty), inside)
    part = (row * tl.num_programs(1) + tl.program_id(1)) * C + channel
    tl.store(d_weight + part, to_weight, real)
    tl.store(d_bias + part, to_bias, real)


@triton.jit
def normed(values, inside, C, eps, CENTRED: tl.constexpr):
    """Values of mean square one, around their mean if CENTRED, and what scales them."""
    if CENTRED:
        values = tl.where(inside, values - (tl.sum(values, 1) / C)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(values * values, 1) / C + eps)[:, None]
    return values * scale, scale
