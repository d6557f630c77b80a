"""The gated short convolution as a torch operator, and which implementation a call takes.

On a GPU the operator runs the Triton kernels; it is opaque to `torch.compile`, and has
fake and autograd formulas. What no kernel takes runs in PyTorch, which compiles and
differentiates it as it does everything.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from based.ops import kernels
from based.ops.fallback import warn_once
from based.ops.gated_short_convolution import shifted
from based.ops.lanes import in_lanes

LARGEST_WIDTH = 8


def gated_short_convolution(
    projected: Float[Tensor, "B T CC"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "N W-1 C"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "N W-1 C"] | None]:
    """y = silu(conv(x)) * gate, and the next state when `past` is given.

    x is the first half of the projection's channels and gate the second. `past` holds
    the W - 1 inputs before each sequence, oldest first (zeros when not given): N = B
    rows, or one a packed sequence. Kernels compute in float32.
    """
    if _takes_kernel(projected, weight):
        y = _forward(projected, weight, past, cu_seqlens)
    else:
        y = shifted.gated_short_convolution(projected, weight, past, cu_seqlens)
    if past is None:
        return y, None
    return y, shifted.next_past(projected[..., : weight.shape[0]], past, cu_seqlens)


def _takes_kernel(projected: Tensor, weight: Tensor) -> bool:
    if not kernels.are_wanted(projected) or in_lanes():
        return False
    reason = _unsupported(weight.shape[1])
    if reason is not None:
        warn_once(f"The gated short convolution takes the slower PyTorch path: {reason}")
    return reason is None


def has_kernels(width: int, x: Tensor) -> bool:
    """Whether a kernel computes calls in x's dtype where x is, if that is a GPU."""
    return not x.is_cuda or (kernels.are_wanted(x) and _unsupported(width) is None)


def _unsupported(width: int) -> str | None:
    """Why no kernel takes such a call; None if one does."""
    if width > LARGEST_WIDTH:
        return f"kernel_size {width} is over {LARGEST_WIDTH}"
    return None if kernels.INSTALLED else "triton is not installed"


@torch.library.custom_op("based::gated_short_convolution", mutates_args=())
def _forward(
    projected: Tensor, weight: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    from based.ops.gated_short_convolution import triton

    return triton.forward(projected, weight, past, cu_seqlens)


@_forward.register_fake
def _forward_fake(
    projected: Tensor, weight: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    return projected.new_empty(*projected.shape[:2], weight.shape[0])


@torch.library.custom_op("based::gated_short_convolution_backward", mutates_args=())
def _backward(
    projected: Tensor,
    weight: Tensor,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the projection, the weight and the state; the last empty if there was none."""
    from based.ops.gated_short_convolution import triton

    *gradients, d_past = triton.backward(projected, weight, past, cu_seqlens, d_out)
    return *gradients, projected.new_empty(0) if d_past is None else d_past  # pyright: ignore[reportReturnType]


@_backward.register_fake
def _backward_fake(
    projected: Tensor,
    weight: Tensor,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_past = projected.new_empty(0) if past is None else past.new_empty(past.shape)
    return projected.new_empty(projected.shape), weight.new_empty(weight.shape), d_past


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, d_out) -> tuple[Tensor | None, ...]:
    projected, weight, past, cu_seqlens = ctx.saved_tensors
    *gradients, d_past = _backward(projected, weight, past, cu_seqlens, d_out)
    return *gradients, None if past is None else d_past, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
