"""The selective scan as Triton kernels: a program carries the states of some channels.

A state never leaves registers but once every CHUNK tokens. The backward pass goes
from the last chunk to the first, computes the chunk's states anew into a scratch
that stays in cache, and walks back over them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 16
CHANNELS = 32


def selective_scan_kernel(
    x: Float[Tensor, "B T D"],
    delta: Float[Tensor, "B T D"],
    A: Float[Tensor, "B D N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Outputs and final state of rows that each have their own A; all float32."""
    return _Scan.apply(*(tensor.contiguous() for tensor in (x, delta, A, b, c, state)))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, last, marks = _scan(x, delta, A, b, c, state)
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
    x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state, and the state before every chunk."""
    (B, T, D), N = x.shape, A.shape[2]
    y, last, marks = _scan_fake(x, delta, A, b, c, state)
    _forward[(B, triton.cdiv(D, CHANNELS))](
        *(x, delta, A, b, c, state, y, last, marks, T, D, N),
        CHUNK=CHUNK,
        BLOCK_D=CHANNELS,
        **_sizes(N),
    )
    return y, last, marks


@_scan.register_fake
def _scan_fake(
    x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    marks = x.new_empty(x.shape[0], -(-x.shape[1] // CHUNK), *A.shape[1:])
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
    _backward[(B, triton.cdiv(D, CHANNELS))](
        *(x, delta, A, b, c, marks, dy, d_last),
        *(*gradients, x.new_empty(B, CHUNK, D, N), T, D, N),
        CHUNK=CHUNK,
        BLOCK_D=CHANNELS,
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
    parts = (triton.cdiv(x.shape[2], CHANNELS), *b.shape)
    wide = (torch.empty_like(tensor) for tensor in (x, delta, A))
    return *wide, x.new_empty(parts), x.new_empty(parts), torch.empty_like(A)  # pyright: ignore[reportReturnType]


def _sizes(N: int) -> dict[str, int]:
    """States a warp holds: more of them would not fit its registers in the backward pass."""
    block = triton.next_power_of_2(N)
    return {"BLOCK_N": block, "num_warps": max(1, block // 8)}


@triton.jit
def _forward(
    x, delta, A, b, c, state, y, last, marks, T, D, N,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_N)
    own, mine = channel < D, place < N
    cell = channel[:, None] * N + place[None, :]
    inside = own[:, None] & mine[None, :]
    a = tl.load(A + row * D * N + cell, inside, 0.0)
    h = tl.load(state + row * D * N + cell, inside, 0.0)
    chunks = tl.cdiv(T, CHUNK)
    for chunk in range(chunks):
        tl.store(marks + (row * chunks + chunk) * D * N + cell, h, inside)
        for token in range(chunk * CHUNK, min(T, (chunk + 1) * CHUNK)):
            at = row * T + token
            step = tl.load(delta + at * D + channel, own, 0.0)
            drive = step * tl.load(x + at * D + channel, own, 0.0)
            b_t = tl.load(b + at * N + place, mine, 0.0)
            c_t = tl.load(c + at * N + place, mine, 0.0)
            h = tl.exp(step[:, None] * a) * h + drive[:, None] * b_t[None, :]
            tl.store(y + at * D + channel, tl.sum(h * c_t[None, :], 1), own)
    tl.store(last + row * D * N + cell, h, inside)


@triton.jit
def _backward(
    x, delta, A, b, c, marks, dy, d_last, dx, d_delta, dA, db, dc, d_state, scratch, T, D, N,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_N)
    own, mine = channel < D, place < N
    cell = channel[:, None] * N + place[None, :]
    inside = own[:, None] & mine[None, :]
    a = tl.load(A + row * D * N + cell, inside, 0.0)
    to_h = tl.load(d_last + row * D * N + cell, inside, 0.0)
    to_a = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    chunks = tl.cdiv(T, CHUNK)
    for back in range(chunks):
        chunk = chunks - 1 - back
        first, count = chunk * CHUNK, min(T - chunk * CHUNK, CHUNK)
        h = tl.load(marks + (row * chunks + chunk) * D * N + cell, inside, 0.0)
        for i in range(count):
            at = row * T + first + i
            step = tl.load(delta + at * D + channel, own, 0.0)
            drive = step * tl.load(x + at * D + channel, own, 0.0)
            b_t = tl.load(b + at * N + place, mine, 0.0)
            h = tl.exp(step[:, None] * a) * h + drive[:, None] * b_t[None, :]
            tl.store(scratch + (row * CHUNK + i) * D * N + cell, h, inside)
        tl.debug_barrier()
        for j in range(count):
            i = count - 1 - j
            at = row * T + first + i
            h = tl.load(scratch + (row * CHUNK + i) * D * N + cell, inside, 0.0)
            step = tl.load(delta + at * D + channel, own, 0.0)
            u = tl.load(x + at * D + channel, own, 0.0)
            b_t = tl.load(b + at * N + place, mine, 0.0)
            c_t = tl.load(c + at * N + place, mine, 0.0)
            dy_t = tl.load(dy + at * D + channel, own, 0.0)
            # to_h is the gradient that reaches h_t; h - added is exp(delta_t A) h_(t-1).
            to_h += dy_t[:, None] * c_t[None, :]
            added = (step * u)[:, None] * b_t[None, :]
            to_exponent = to_h * (h - added)
            to_drive = tl.sum(to_h * b_t[None, :], 1)
            to_step = to_drive * u + tl.sum(to_exponent * a, 1)
            to_a += to_exponent * step[:, None]
            part = (block * tl.num_programs(0) + row) * T + first + i
            tl.store(dc + part * N + place, tl.sum(dy_t[:, None] * h, 0), mine)
            tl.store(db + part * N + place, tl.sum((step * u)[:, None] * to_h, 0), mine)
            tl.store(dx + at * D + channel, to_drive * step, own)
            tl.store(d_delta + at * D + channel, to_step, own)
            to_h = tl.exp(step[:, None] * a) * to_h
        tl.debug_barrier()
    tl.store(dA + row * D * N + cell, to_a, inside)
    tl.store(d_state + row * D * N + cell, to_h, inside)
