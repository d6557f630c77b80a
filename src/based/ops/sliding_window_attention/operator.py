"""Sliding-window attention as torch operators, and which implementation a call takes.

The operators are the Triton kernels: opaque to `torch.compile`, with fake and
autograd formulas. Where they do not run, the PyTorch blocks do.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from based.ops import kernels
from based.ops.fallback import warn_once
from based.ops.lanes import lanes_as_rows
from based.ops.sliding_window_attention import blocked

LARGEST_HEAD_DIM = 256


@lanes_as_rows
def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S H D"],
    v: Float[Tensor, "B S H D"],
    window: int,
    past: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H D"]:
    """Causal attention over the last `window` keys, as `reference.py` defines it.

    k and v may begin with P = S - T past keys, of which row b's last `past[b]`
    exist. A packed batch (`cu_seqlens`, B = 1) has no past keys. `dropout` is the
    probability with which each attention weight is dropped; only the PyTorch
    blocks drop any.
    """
    if dropout == 0 and _takes_kernels(q):
        return _forward(q, k, v, window, past, cu_seqlens)[0]
    return blocked.sliding_window_attention(q, k, v, window, past, cu_seqlens, dropout)


def _takes_kernels(q: Tensor) -> bool:
    if not kernels.are_wanted(q):
        return False
    reason = _unsupported(q.shape[3], q.dtype)
    if reason is not None:
        warn_once(f"Sliding-window attention takes the slower PyTorch path: {reason}")
    return reason is None


def _unsupported(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why no kernel takes such a call; None if one does."""
    largest = LARGEST_HEAD_DIM // 2 if dtype == torch.float32 else LARGEST_HEAD_DIM
    if head_dim > largest:
        return f"head_dim {head_dim} is over {largest} in {dtype}"
    return None if kernels.INSTALLED else "triton is not installed"


@torch.library.custom_op("based::sliding_window_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and log2 of each query's sum of exponentials, [B, H, T]."""
    from based.ops.sliding_window_attention.kernels import launch

    return launch.forward(q, k, v, window, past, cu_seqlens)


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("based::sliding_window_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from based.ops.sliding_window_attention.kernels import launch

    return launch.backward(q, k, v, window, past, cu_seqlens, out, lse, d_out)


@_backward.register_fake
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.window, past, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, past, cu_seqlens, *output)


def _gradients(ctx, d_out, _) -> tuple[Tensor | None, ...]:
    q, k, v, past, cu_seqlens, out, lse = ctx.saved_tensors
    d_q, d_k, d_v = _backward(q, k, v, ctx.window, past, cu_seqlens, out, lse, d_out)
    return d_q, d_k, d_v, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
