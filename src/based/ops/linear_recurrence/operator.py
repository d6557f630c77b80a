"""The kernels as operators, and which inputs they take."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from based.ops import kernels
from based.ops.lanes import lanes_as_rows

# Tokens of a chunk: what the kernels multiply at once, the least that a tensor core takes.
CHUNK = 16
# The largest keys that a program has room for: with a decay a head, and one a channel.
MOST_KEYS, MOST_DECAYING_KEYS = 128, 64

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def has_kernel(v: Tensor, key_dim: int, decays: int = 1) -> bool:
    """Whether the kernels take a recurrence with so many decays a head: on a GPU, small keys."""
    most = MOST_KEYS if decays == 1 else MOST_DECAYING_KEYS
    return kernels.use_kernels(v) and key_dim <= most


@lanes_as_rows
def linear_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"] | None,
    b: Float[Tensor, "B T H K"] | None,
    log_decay: Float[Tensor, "B T H #K"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs in v's dtype and the final state, float32.

    Any strides; a and b are given both or neither; log_decay
    <= 0 is one number a head or one a channel. Products are in TF32 where torch's
    own of float32 are, otherwise in three TF32 products that come close to float32.
    """
    given = (q, k, v, a, b, log_decay.float(), state.float().contiguous())
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return _Recurrence.apply(*given)
    out, last, _ = _forward(*given, keep=False)
    return out, last


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        g: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, last, marks = _forward(q, k, v, a, b, g, state, keep=True)
        ctx.save_for_backward(q, k, v, a, b, g, marks)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_out: Tensor, d_last: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, a, b, g, marks = ctx.saved_tensors
        given = d_out.contiguous(), d_last.contiguous()
        *parts, dv, d_state = _backward(q, k, v, a, b, g, marks, *given)
        dq, dk, da, db, dg = (part.sum(0) if len(part) > 1 else part[0] for part in parts)
        low_rank = (None, None) if a is None or b is None else (da.to(a.dtype), db.to(b.dtype))
        return dq.to(q.dtype), dk.to(k.dtype), dv, *low_rank, dg, d_state


# Operators, so that `torch.compile` takes the launches as they are.
@torch.library.custom_op("based::linear_recurrence", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    g: Tensor,
    state: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state, and to `keep` the state before every chunk and after the last."""
    from based.ops.linear_recurrence import triton

    out, last, marks = _forward_fake(q, k, v, a, b, g, state, keep)
    sizes = _sizes(q, k, v, a, b, g)
    sizes["KEEP"] = keep
    given = q, k, v, a, b, g, state, out, last, marks
    triton.forward[_grid(v, q.shape[3])](*given, **sizes)
    return out, last, marks


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    g: Tensor,
    state: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, K, V = state.shape
    marks = state.new_empty((B, H, -(-v.shape[1] // CHUNK) + 1, K, V) if keep else 0)
    return v.new_empty(v.shape), torch.empty_like(state), marks


@torch.library.custom_op("based::linear_recurrence_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    g: Tensor,
    marks: Tensor,
    d_out: Tensor,
    d_last: Tensor,
) -> Parts:
    """Gradients of q, k, a, b, g, v and state; of the first five a part from every block of v."""
    from based.ops.linear_recurrence import triton

    gradients = _backward_fake(q, k, v, a, b, g, marks, d_out, d_last)
    # Decays of every channel leave no registers for loads ahead, nor room for a second program.
    alone = {"num_warps": 8} if q.shape[3] > 32 else {}
    own = {"num_stages": 1, **alone} if g.shape[3] > 1 else {}
    triton.backward[_grid(v, q.shape[3])](
        *(q, k, v, a, b, g, marks, d_out, d_last, *gradients),
        **{**_sizes(q, k, v, a, b, g), **own},
    )
    return gradients


@_backward.register_fake
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    g: Tensor,
    marks: Tensor,
    d_out: Tensor,
    d_last: Tensor,
) -> Parts:
    _, blocks = _grid(v, q.shape[3])
    dq, dk = (marks.new_empty(blocks, *x.shape) for x in (q, k))
    da, db = (torch.empty_like(dq) if x is not None else dq.new_empty(1) for x in (a, b))
    dg = marks.new_empty(blocks, *g.shape)
    return dq, dk, da, db, dg, v.new_empty(v.shape), torch.empty_like(d_last)


def _power_of_2(size: int) -> int:
    """At least `size`, and what a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def _block(K: int) -> int:
    """Columns of the state that a program holds, at most."""
    return 64 if K <= 64 else 32


def _grid(v: Tensor, K: int) -> tuple[int, int]:
    B, _, H, V = v.shape
    return B * H, -(-V // _block(K))


def _sizes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    g: Tensor,
) -> dict[str, Any]:
    (_, T, H, K), V = q.shape, v.shape[3]
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g}
    strides = {
        f"{name}_{axis}": 0 if x is None else x.stride(place)
        for name, x in tensors.items()
        for place, axis in enumerate("bthc")
    }
    return {
        **strides,
        "T": T,
        "H": H,
        "K": K,
        "V": V,
        "CHUNK": CHUNK,
        "LEVELS": CHUNK.bit_length() - 1,
        "BLOCK_K": _power_of_2(K),
        "BLOCK_V": min(_block(K), _power_of_2(V)),
        "A_CHANNEL": g.shape[3] > 1,
        "LOW_RANK": a is not None,
        "PRECISION": kernels.products_of(torch.float32),
        # Tiles of 16 tokens are soon too small for more warps.
        "num_warps": 2 if K <= 32 else 4 if K <= 64 else 8,
    }
