"""One pass forward, one back: a program walks a stretch of one row's tokens for some channels.

The last W inputs stay in registers, a tuple from the oldest on, and so do the gradients
that reach them: each input is read once. Tokens come a few at a time, whose loads wait
together. Strides of tokens are constants, so that the compiler sees which widths allow
loads of 16 bytes.
"""

import triton
import triton.language as tl

# Tokens whose loads are on their way at once.
GROUP = tl.constexpr(4)


@triton.jit
def forward(
    x, weight, bias, gate, y, x_b, gate_b, weight_b, weight_c, weight_w, bias_b, T, C,
    X_T: tl.constexpr, GATE_T: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A stretch of outputs. Grid: rows, blocks of channels, stretches."""
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(2) * STRETCH
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x, y = x + row * x_b, y + row * T * C
    if gate is not None:
        gate += row * gate_b
    taps = _taps(weight + row * weight_b, weight_c, weight_w, channel, C, W)
    shift = _shift(bias, row * bias_b, channel, C)
    seen = _tokens(x, X_T, begin - W, channel, T, C, W)
    for first in range(begin, min(begin + STRETCH, T), GROUP):
        new = _tokens(x, X_T, first, channel, T, C, GROUP)
        gates = new
        if gate is not None:
            gates = _tokens(gate, GATE_T, first, channel, T, C, GROUP)
        for i in tl.static_range(GROUP):
            seen = seen[1:] + (new[i],)
            out = _dot(taps, seen) + shift
            if SILU:
                out *= tl.sigmoid(out)
            if gate is not None:
                out = out * gates[i] + new[i]
            _store(y, first + i, channel, out, first + i < T, C)


@triton.jit
def backward(
    x, weight, bias, gate, dy, dx, d_weight, d_bias, d_gate,
    x_b, gate_b, weight_b, weight_c, weight_w, bias_b, T, C,
    X_T: tl.constexpr, GATE_T: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A stretch's input gradients and its part of those of weight and bias. `forward`'s grid.

    An input's gradient is whole W - 1 tokens later, so the walk goes on as far past the
    stretch; what it meets there counts for the next one's weights.
    """
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(2) * STRETCH
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = min(begin + STRETCH, T)
    x, dy, dx = x + row * x_b, dy + row * T * C, dx + row * T * C
    if gate is not None:
        gate, d_gate = gate + row * gate_b, d_gate + row * T * C
    taps = _taps(weight + row * weight_b, weight_c, weight_w, channel, C, W)
    shift = _shift(bias, row * bias_b, channel, C)
    seen = _tokens(x, X_T, begin - W, channel, T, C, W)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    to_z, past_gate = (zero,) * W, (zero,) * W
    to_taps, to_shift = (zero,) * W, zero
    for first in range(begin, end + W - 1, GROUP):
        new = _tokens(x, X_T, first, channel, T, C, GROUP)
        given = _tokens(dy, C, first, channel, T, C, GROUP)
        gates = new
        if gate is not None:
            gates = _tokens(gate, GATE_T, first, channel, T, C, GROUP)
        for i in tl.static_range(GROUP):
            t = first + i
            seen = seen[1:] + (new[i],)
            z, out = _dot(taps, seen) + shift, given[i]
            if gate is not None:
                _store(d_gate, t, channel, out * z, t < end, C)
                out *= gates[i]
                past_gate = past_gate[1:] + (given[i],)
            if SILU:
                share = tl.sigmoid(z)
                out *= share * (1 + z * (1 - share))
            to_z = to_z[1:] + (out,)
            own = tl.where(t < end, out, 0.0)
            to_taps, to_shift = _add(to_taps, own, seen), to_shift + own
            d_x = _dot_reversed(taps, to_z)
            if gate is not None:
                d_x += past_gate[0]
            then = t - (W - 1)
            _store(dx, then, channel, d_x, (then >= begin) & (then < end), C)
    part = (row * tl.num_programs(2) + tl.program_id(2)) * C + channel
    for j in tl.static_range(W):
        tl.store(d_weight + part * W + j, to_taps[j], channel < C)
    tl.store(d_bias + part, to_shift, channel < C)


@triton.jit
def _taps(weight, C_STRIDE, W_STRIDE, channel, C, W: tl.constexpr):
    """A row's taps, that of the oldest token first."""
    taps = ()
    for j in tl.static_range(W):
        tap = tl.load(weight + channel * C_STRIDE + j * W_STRIDE, channel < C, 0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def _shift(bias, offset, channel, C):
    shift = tl.zeros((channel.shape[0],), tl.float32)
    if bias is not None:
        shift += tl.load(bias + offset + channel, channel < C, 0.0).to(tl.float32)
    return shift


@triton.jit
def _tokens(x, T_STRIDE: tl.constexpr, first, channel, T, C, COUNT: tl.constexpr):
    """So many tokens from the first on, float32; zeros outside the sequence."""
    tokens = ()
    for i in tl.static_range(COUNT):
        t = first + i
        at = x + tl.cast(t, tl.int64) * T_STRIDE + channel
        value = tl.load(at, (channel < C) & (t >= 0) & (t < T), 0.0)
        tokens = tokens + (value.to(tl.float32),)
    return tokens


@triton.jit
def _store(x, t, channel, value, wanted, C):
    at = x + tl.cast(t, tl.int64) * C + channel
    tl.store(at, value.to(x.dtype.element_ty), wanted & (channel < C))


@triton.jit
def _dot(taps, tokens):
    """sum_j taps_j tokens_j."""
    total = taps[0] * tokens[0]
    for j in tl.static_range(1, len(taps)):
        total += taps[j] * tokens[j]
    return total


@triton.jit
def _dot_reversed(taps, tokens):
    """What reaches the oldest of the tokens, which the last tap met first."""
    total = taps[len(taps) - 1] * tokens[0]
    for j in tl.static_range(1, len(taps)):
        total += taps[len(taps) - 1 - j] * tokens[j]
    return total


@triton.jit
def _add(totals, factor, tokens):
    """totals_j + factor tokens_j."""
    sums = ()
    for j in tl.static_range(len(totals)):
        sums = sums + (totals[j] + factor * tokens[j],)
    return sums
