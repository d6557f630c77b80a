"""The selective scan in spans and chunks: memory linear in length, any device.

A span of tokens is as long as its states, [T, D, N], stay small; only the state
before each span is kept, and the backward pass computes the span anew. Inside a
span the chunks are scanned side by side, the states between them after that.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from based.ops.chunks import chunk_of
from based.ops.lanes import lanes_as_rows
from based.ops.peers import peer_kernel
from based.ops.precision import state_dtype, without_autocast

# States of one span, in elements: a CPU's cache, or enough to fill a GPU.
SPAN_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


@without_autocast
def selective_scan(
    x: Float[Tensor, "B T D"],
    delta: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Outputs in x's dtype and the final state, as `reference.py` defines them.

    The state starts at zero when it is not given; accumulation and state are
    float32 (float64 for float64 inputs).
    """
    dtype, out_dtype, (B, T, D) = state_dtype(x.dtype), x.dtype, x.shape
    x, delta, A, b, c = (y.to(dtype) for y in (x, delta, A, b, c))
    # mamba-ssm's kernel cannot begin with a state.
    module, dtypes = "mamba_ssm.ops.selective_scan_interface", (torch.float32,)
    kernel = peer_kernel(module, "selective_scan_fn", x, dtypes)
    if kernel is not None and state is None and T:
        u, delta, b, c = (y.mT.contiguous() for y in (x, delta, b, c))
        out, last = kernel(u, delta, A, b, c, return_last_state=True)
        return out.mT.to(out_dtype), last
    if state is None:
        state = x.new_zeros(B, D, A.shape[1])
    y, last = _scan_rows(x, delta, A.expand(B, -1, -1), b, c, state)
    return y.to(out_dtype), last


@lanes_as_rows
def _scan_rows(
    x: Float[Tensor, "B T D"],
    delta: Float[Tensor, "B T D"],
    A: Float[Tensor, "B D N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Every row with decay rates of its own: rows of different models are one batch."""
    if x.is_cuda and x.dtype == torch.float32 and x.shape[1]:
        from based.ops.selective_scan.triton import selective_scan_kernel

        return selective_scan_kernel(x, delta, A, b, c, state)
    outs, span = [], max(16, SPAN_ELEMENTS.get(x.device.type, 1 << 24) // max(state.numel(), 1))
    for first in range(0, x.shape[1], span):
        part = slice(first, first + span)
        y, state = _Span.apply(x[:, part], delta[:, part], A, b[:, part], c[:, part], state)
        outs.append(y)
    return torch.cat(outs, dim=1) if outs else x, state


class _Span(torch.autograd.Function):
    """A span's outputs and final state; its states are computed again for the gradients.

    With l_t the gradient that reaches h_t, l_t = c_t dy_t + exp(delta_(t+1) A) l_(t+1):
    the same scan, from the last token to the first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "B T D"],
        delta: Float[Tensor, "B T D"],
        A: Float[Tensor, "B D N"],
        b: Float[Tensor, "B T N"],
        c: Float[Tensor, "B T N"],
        state: Float[Tensor, "B D N"],
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
        ctx.save_for_backward(x, delta, A, b, c, state)
        h = _scan(delta, A, delta * x, b, state)
        return (h @ c[..., None])[..., 0], h[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Float[Tensor, "B T D"], d_last: Float[Tensor, "B D N"]
    ) -> tuple[Tensor, ...]:
        x, delta, A, b, c, state = ctx.saved_tensors
        h = _scan(delta, A, delta * x, b, state)
        dc = (dy[..., None, :] @ h)[..., 0, :]
        # Backwards in time; the state after the last token reaches it undecayed.
        later = F.pad(delta[:, 1:], (0, 0, 0, 1)).flip(1)
        to_h = _scan(later, A, dy.flip(1), c.flip(1), d_last).flip(1)
        drive = (to_h @ b[..., None])[..., 0]
        db = ((delta * x)[..., None, :] @ to_h)[..., 0, :]
        # h_t without what token t added is exp(delta_t A) h_(t-1).
        to_exponent = to_h * (h - (delta * x)[..., None] * b[:, :, None, :])
        d_delta = drive * x + (to_exponent * A[:, None]).sum(-1)
        dA = (to_exponent * delta[..., None]).sum(1)
        d_state = to_h[:, 0] * (delta[:, 0, :, None] * A).exp()
        return drive * delta, d_delta, dA, db, dc, d_state


def _scan(
    delta: Float[Tensor, "B T D"],
    A: Float[Tensor, "B D N"],
    inputs: Float[Tensor, "B T D"],
    b: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"],
) -> Float[Tensor, "B T D N"]:
    """All states h_t = exp(delta_t A) h_(t-1) + inputs_t b_t^T, from `state`."""
    T, A = delta.shape[1], A[:, None, None]
    # About as many chunks as tokens in a chunk: both are loops.
    chunk = chunk_of(int(T**0.5), T)
    delta, inputs, b = (
        F.pad(y, (0, 0, 0, -T % chunk)).unflatten(1, (-1, chunk)) for y in (delta, inputs, b)
    )
    h = inputs[..., None] * b[..., None, :]
    decay = (delta[..., None] * A).exp()
    for token in range(1, chunk):
        h[:, :, token].addcmul_(decay[:, :, token], h[:, :, token - 1])
    to_token = torch.mul(delta.cumsum(2)[..., None], A, out=decay).exp_()
    before = []
    for number in range(h.shape[1]):
        before.append(state)
        state = torch.addcmul(h[:, number, -1], to_token[:, number, -1], state)
    h.addcmul_(to_token, torch.stack(before, dim=1)[:, :, None])
    return h.flatten(1, 2)[:, :T]
