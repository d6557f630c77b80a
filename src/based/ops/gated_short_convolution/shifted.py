"""A short causal convolution as a sum of shifted products: no transpose, any device."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from based.ops.packed import once_a_batch, positions


def short_convolution(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "N W-1 C"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> Float[Tensor, "B T C"]:
    """y_t = sum_j weight_j x_(t-W+1+j), causal and a channel at a time.

    `past` holds the W - 1 inputs before each sequence, oldest first (zeros when
    not given). In a packed batch (B = 1) inputs of other sequences count as zero.
    """
    T, width = x.shape[1], weight.shape[1]
    front = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    if past is not None and cu_seqlens is None:
        front = past.to(x.dtype)
    inputs = torch.cat([front, x], dim=1)
    y = x * weight[:, -1]
    where = None if cu_seqlens is None else positions(cu_seqlens, T)[None, :, None]
    for back in range(1, width):
        shifted = inputs[:, width - 1 - back : width - 1 - back + T]
        if where is not None:
            shifted = torch.where(where >= back, shifted, 0)
        y = y + shifted * weight[:, width - 1 - back]
    if past is not None and cu_seqlens is not None:
        y = _add_past(y, weight, past, cu_seqlens)
    return y


def _add_past(
    y: Float[Tensor, "1 T C"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "N W-1 C"],
    cu_seqlens: Int[Tensor, " E"],
) -> Float[Tensor, "1 T C"]:
    """Adds what the state contributes to the first W - 1 outputs of each sequence."""
    width = weight.shape[1]
    tail = short_convolution(F.pad(past.to(y.dtype), (0, 0, 0, width - 1)), weight)[:, width - 1 :]
    index = cu_seqlens[:-1, None] + torch.arange(width - 1, device=y.device)
    inside = index < cu_seqlens[1:, None]
    return y.index_add(1, index[inside], tail[inside][None])


def next_past(
    x: Float[Tensor, "B T C"],
    past: Float[Tensor, "N P C"],
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> Float[Tensor, "N P C"]:
    """The last W - 1 inputs of each sequence, its own state included, oldest first."""
    count = past.shape[1]
    if cu_seqlens is None:
        new = min(count, x.shape[1])
        last = x[:, x.shape[1] - new :].to(past.dtype)
        return torch.cat([past[:, new:], last], dim=1)
    token, older, inside = _newest(cu_seqlens, count)
    from_past = past.gather(1, older.expand(-1, -1, past.shape[2]))
    if x.shape[1] == 0:
        return from_past
    return torch.where(inside, x[0, token].to(past.dtype), from_past)


def last_inputs(
    x: Float[Tensor, "1 T C"], cu_seqlens: Int[Tensor, " E"], count: int
) -> Float[Tensor, "N P C"]:
    """`next_past` of sequences that begin here."""
    token, _, inside = _newest(cu_seqlens, count)
    return torch.where(inside, x[0, token], 0)


@once_a_batch
def _newest(cu_seqlens: Int[Tensor, " E"], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sequence's last `count` inputs the tokens, else slots of its state, and which."""
    # Slot j of sequence n is token (end - count + j), or an older slot of the state.
    token = cu_seqlens[1:, None] - count + torch.arange(count, device=cu_seqlens.device)
    older = (token - cu_seqlens[:-1, None] + count).clamp(min=0, max=count - 1)
    inside = token >= cu_seqlens[:-1, None]
    return token.clamp(min=0), older[..., None], inside[..., None]


def gated_short_convolution(
    projected: Float[Tensor, "B T CC"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "N W-1 C"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> Float[Tensor, "B T C"]:
    """y = silu(conv(x)) * gate, as `operator.py` describes it."""
    x, gate = projected.chunk(2, dim=-1)
    return F.silu(short_convolution(x, weight, past, cu_seqlens)) * gate
