"""One token of Mamba's scan: the time step, the state, the skip and the gate in one pass."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from based.ops.kernels import overlap
from based.ops.overlap import wait_for_previous

LAUNCH = {"BLOCK_D": 64, "num_warps": 4}


@triton.jit
@no_type_check
def _scan_step_kernel(
    x_ptr,
    delta_ptr,
    delta_bias_ptr,
    a_log_ptr,
    b_ptr,
    c_ptr,
    skip_ptr,
    gate_ptr,
    state_ptr,
    out_ptr,
    b_stride,
    c_stride,
    gate_stride,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    real, inside = d < D, n < N
    cell = d[:, None] * N + n[None, :]
    present = real[:, None] & inside[None, :]
    A = -tl.exp(tl.load(a_log_ptr + cell, mask=present, other=0.0).to(tl.float32))
    bias = tl.load(delta_bias_ptr + d, mask=real, other=0.0).to(tl.float32)
    skip = tl.load(skip_ptr + d, mask=real, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    h = tl.load(state_ptr + row * D * N + cell, mask=present, other=0.0)
    x = tl.load(x_ptr + row * D + d, mask=real, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + row * D + d, mask=real, other=0.0).to(tl.float32) + bias
    # softplus, which is the identity far out.
    delta = tl.where(delta > 20, delta, tl.log(1 + tl.exp(tl.minimum(delta, 20.0))))
    b = tl.load(b_ptr + row * b_stride + n, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + row * c_stride + n, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + d, mask=real, other=0.0).to(tl.float32)
    h = h * tl.exp(delta[:, None] * A) + (delta * x)[:, None] * b[None, :]
    tl.store(state_ptr + row * D * N + cell, h, mask=present)
    y = tl.sum(h * c[None, :], axis=1) + skip * x
    tl.store(out_ptr + row * D + d, y * gate * tl.sigmoid(gate), mask=real)


def scan_step_kernel(
    x: Float[Tensor, "B D"],
    delta: Float[Tensor, "B D"],
    delta_bias: Float[Tensor, " D"],
    A_log: Float[Tensor, "D N"],
    b: Float[Tensor, "B N"],
    c: Float[Tensor, "B N"],
    skip: Float[Tensor, " D"],
    gate: Float[Tensor, "B D"],
    state: Float[Tensor, "B D N"],
) -> Float[Tensor, "B D"]:
    """(scan + skip x) silu(gate), the time step softplus(delta + bias); changes the state in place.

    x, delta, the parameters and the state are contiguous; b, c and gate may be slices.
    """
    (rows, D), N = x.shape, state.shape[2]
    out = torch.empty_like(x)
    _scan_step_kernel[(rows, triton.cdiv(D, LAUNCH["BLOCK_D"]))](
        x,
        delta,
        delta_bias,
        A_log,
        b,
        c,
        skip,
        gate,
        state,
        out,
        b.stride(0),
        c.stride(0),
        gate.stride(0),
        D=D,
        N=N,
        BLOCK_N=triton.next_power_of_2(N),
        **overlap(x),
        **LAUNCH,
    )
    return out
