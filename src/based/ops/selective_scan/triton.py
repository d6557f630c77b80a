"""The selective scan as Triton kernels: a program carries the states of some channels.

A state never leaves registers but once every CHUNK tokens. The backward pass goes
from the last chunk to the first, computes every fourth of the chunk's states anew
into a scratch that stays in cache, and from there four at a time, over which it
walks back. Four tokens at once: their loads wait together.
"""

from math import e, log, log2
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 16
# Of a thread of the backward pass: as few as it needs, so that others run beside it.
REGISTERS = 168
LOG2_E, LN_2 = tl.constexpr(log2(e)), tl.constexpr(log(2))


def selective_scan_kernel(
    x: Float[Tensor, "B T D"],
    delta: Float[Tensor, "B T D"],
    A: Float[Tensor, "B D N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Outputs and final state of rows that each have their own A; all float32."""
    given = tuple(tensor.contiguous() for tensor in (x, delta, A, b, c, state))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Scan.apply(*given)
    y, last, _ = _scan(*given, keep=False)
    return y, last


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, last, marks = _scan(x, delta, A, b, c, state, keep=True)
        ctx.save_for_backward(x, delta, A, b, c, marks)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, d_last: Tensor
    ) -> tuple[Tensor, ...]:
        *gradients, db, dc, d_state = _scan_backward(
            *ctx.saved_tensors, dy.contiguous(), d_last.contiguous()
        )
        return *gradients, db.sum(0), dc.sum(0), d_state


# Operators, so that `torch.compile` takes the launches as they are.
@torch.library.custom_op("based::selective_scan", mutates_args=())
def _scan(
    x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state, and to `keep` the state before every chunk."""
    (B, T, D), N = x.shape, A.shape[2]
    y, last, marks = _scan_fake(x, delta, A, b, c, state, keep)
    _forward[_grid(B, D, N)](
        *(x, delta, A, b, c, state, y, last, marks, T, D),
        CHUNK=CHUNK,
        KEEP=keep,
        **_sizes(N),
    )
    return y, last, marks


@_scan.register_fake
def _scan_fake(
    x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = -(-x.shape[1] // CHUNK)
    marks = x.new_empty((x.shape[0], chunks, *A.shape[1:]) if keep else 0)
    return torch.empty_like(x), torch.empty_like(state), marks


@torch.library.custom_op("based::selective_scan_backward", mutates_args=())
def _scan_backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    marks: Tensor,
    dy: Tensor,
    d_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, b, c and state; of b and c a part from every block of channels."""
    (B, T, D), N = x.shape, A.shape[2]
    gradients = _scan_backward_fake(x, delta, A, b, c, marks, dy, d_last)
    _backward[_grid(B, D, N)](
        *(x, delta, A, b, c, marks, dy, d_last),
        *(*gradients, x.new_empty(B, CHUNK // 4, D, N), T, D),
        CHUNK=CHUNK,
        maxnreg=REGISTERS,
        **_sizes(N),
    )
    return gradients


@_scan_backward.register_fake
def _scan_backward_fake(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    marks: Tensor,
    dy: Tensor,
    d_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = (_grid(*x.shape[::2], A.shape[2])[1], *b.shape)
    wide = (torch.empty_like(tensor) for tensor in (x, delta, A))
    return *wide, x.new_empty(parts), x.new_empty(parts), torch.empty_like(A)  # pyright: ignore[reportReturnType]


def _sizes(N: int) -> dict[str, int]:
    """A warp of 256 states: more would not fit its registers, and warps would wait to add up."""
    block = triton.next_power_of_2(N)
    return {"N": N, "BLOCK_N": block, "BLOCK_D": max(1, 256 // block), "num_warps": 1}


def _grid(B: int, D: int, N: int) -> tuple[int, int]:
    return B, triton.cdiv(D, _sizes(N)["BLOCK_D"])


@triton.jit
def _forward(
    x, delta, A, b, c, state, y, last, marks, T, D,
    N: tl.constexpr, CHUNK: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_N)
    cell = channel[:, None] * N + place[None, :]
    inside = (channel[:, None] < D) & (place[None, :] < N)
    rate = tl.load(A + row * D * N + cell, inside, 0.0) * LOG2_E
    h = tl.load(state + row * D * N + cell, inside, 0.0)
    x, delta, y = x + row * T * D, delta + row * T * D, y + row * T * D
    b, c = b + row * T * N, c + row * T * N
    chunks = tl.cdiv(T, CHUNK)
    for chunk in range(chunks):
        if KEEP:
            tl.store(marks + (row * chunks + chunk) * D * N + cell, h, inside)
        for t in range(chunk * CHUNK, min(T, (chunk + 1) * CHUNK), 4):
            steps, drives, bs = _four(x, delta, b, t, channel, place, T, D, N)
            c0, c1 = _row(c, t, place, T, N), _row(c, t + 1, place, T, N)
            c2, c3 = _row(c, t + 2, place, T, N), _row(c, t + 3, place, T, N)
            h0, h1, h2, h = _states(h, steps, drives, bs, rate)
            _put(y, t, channel, tl.sum(h0 * c0[None, :], 1), T, D)
            _put(y, t + 1, channel, tl.sum(h1 * c1[None, :], 1), T, D)
            _put(y, t + 2, channel, tl.sum(h2 * c2[None, :], 1), T, D)
            _put(y, t + 3, channel, tl.sum(h * c3[None, :], 1), T, D)
    tl.store(last + row * D * N + cell, h, inside)


@triton.jit
def _backward(
    x, delta, A, b, c, marks, dy, d_last, dx, d_delta, dA, db, dc, d_state, scratch, T, D,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_N)
    cell = channel[:, None] * N + place[None, :]
    inside = (channel[:, None] < D) & (place[None, :] < N)
    rate = tl.load(A + row * D * N + cell, inside, 0.0) * LOG2_E
    to_h = tl.load(d_last + row * D * N + cell, inside, 0.0)
    to_rate = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    x, delta, dy = x + row * T * D, delta + row * T * D, dy + row * T * D
    dx, d_delta = dx + row * T * D, d_delta + row * T * D
    part = (block * tl.num_programs(0) + row) * T * N
    b, c, db, dc = b + row * T * N, c + row * T * N, db + part, dc + part
    scratch += row * (CHUNK // 4) * D * N
    chunks = tl.cdiv(T, CHUNK)
    for back in range(chunks):
        chunk = chunks - 1 - back
        fours = tl.cdiv(min(T - chunk * CHUNK, CHUNK), 4)
        h = tl.load(marks + (row * chunks + chunk) * D * N + cell, inside, 0.0)
        for four in range(fours):
            tl.store(scratch + four * D * N + cell, h, inside)
            t = chunk * CHUNK + 4 * four
            steps, drives, bs = _four(x, delta, b, t, channel, place, T, D, N)
            _, _, _, h = _states(h, steps, drives, bs, rate)
        tl.debug_barrier()
        for later in range(fours):
            four = fours - 1 - later
            t = chunk * CHUNK + 4 * four
            h = tl.load(scratch + four * D * N + cell, inside, 0.0)
            steps, drives, bs = _four(x, delta, b, t, channel, place, T, D, N)
            states = (h,) + _states(h, steps, drives, bs, rate)
            given, sizes = (x, c, dy, dx, d_delta, db, dc), (channel, place, T, D, N)
            for i in tl.static_range(3, -1, -1):
                token = t + i, steps[i], drives[i], bs[i], states[i], states[i + 1]
                to_h, to_rate = _back(given, token, rate, to_h, to_rate, sizes)
        tl.debug_barrier()
    tl.store(dA + row * D * N + cell, to_rate, inside)
    tl.store(d_state + row * D * N + cell, to_h, inside)


@triton.jit
def _back(given, token, rate, to_h, to_rate, sizes):
    """Gradients of token t, whose state was `before` and is h; to_h reaches it from later ones."""
    x, c, dy, dx, d_delta, db, dc = given
    t, step, drive, b_t, before, h = token
    channel, place, T, D, N = sizes
    dy_t, u = _row(dy, t, channel, T, D), _row(x, t, channel, T, D)
    to_h += dy_t[:, None] * _row(c, t, place, T, N)[None, :]
    _put(dc, t, place, tl.sum(dy_t[:, None] * h, 0), T, N)
    _put(db, t, place, tl.sum(drive[:, None] * to_h, 0), T, N)
    to_drive = tl.sum(to_h * b_t[None, :], 1)
    to_h *= _decay(step, rate)
    to_exponent = to_h * before
    to_step = to_drive * u + tl.sum(to_exponent * rate, 1) * LN_2
    _put(dx, t, channel, to_drive * step, T, D)
    _put(d_delta, t, channel, to_step, T, D)
    return to_h, to_rate + to_exponent * step[:, None]


@triton.jit
def _four(x, delta, b, t, channel, place, T, D, N):
    """What `_drive` says of token t and the three behind it, a tuple of each."""
    steps, drives, bs = (), (), ()
    for i in tl.static_range(4):
        step, drive, b_t = _drive(x, delta, b, t + i, channel, place, T, D, N)
        steps, drives, bs = steps + (step,), drives + (drive,), bs + (b_t,)
    return steps, drives, bs


@triton.jit
def _states(h, steps, drives, bs, rate):
    """The states after each of those tokens."""
    states = ()
    for i in tl.static_range(4):
        h = _decay(steps[i], rate) * h + drives[i][:, None] * bs[i][None, :]
        states = states + (h,)
    return states


@triton.jit
def _drive(x, delta, b, t, channel, place, T, D, N):
    """Time step, its product with x, and b of token t; past the end zeros, which change nothing."""
    step = _row(delta, t, channel, T, D)
    return step, step * _row(x, t, channel, T, D), _row(b, t, place, T, N)


@triton.jit
def _decay(step, rate):
    """exp(delta_t A)."""
    return tl.exp2(step[:, None] * rate)


@triton.jit
def _row(x, t, channel, T, C):
    return tl.load(x + tl.cast(t, tl.int64) * C + channel, (t < T) & (channel < C), 0.0)


@triton.jit
def _put(x, t, channel, values, T, C):
    tl.store(x + tl.cast(t, tl.int64) * C + channel, values, (t < T) & (channel < C))
