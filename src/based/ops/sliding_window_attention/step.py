"""One token against a cache of rotated keys: a window's ring, or a cache that is never full."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.kernels import use_kernels
from based.ops.rotary import rotate


def attention_step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B G D"],
    v: Float[Tensor, "B G D"],
    keys: Float[Tensor, "B S G D"],
    values: Float[Tensor, "B S G D"],
    seen: Int[Tensor, " B"],
    frequencies: Float[Tensor, " R"],
) -> Float[Tensor, "B H D"]:
    """Softmax attention of each row's token number `seen` over the S last keys, its own included.

    q and k are not rotated yet. The cache holds token t in slot t mod S; the new
    token is written there in place; `seen` is the caller's to advance. H is a multiple of G.
    """
    if use_kernels(q):
        from based.ops.sliding_window_attention.decode import attention_step_kernel

        return attention_step_kernel(q, k, v, keys, values, seen, frequencies)
    return _attend(q, k, v, keys, values, seen, frequencies)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, seen: Tensor, frequencies: Tensor
) -> Tensor:
    (B, H, D), (S, G) = q.shape, keys.shape[1:3]
    position = seen[:, None]
    q, k = (rotate(x[:, None], position, frequencies)[:, 0] for x in (q, k))
    row, place = torch.arange(B, device=q.device), seen % S
    keys[row, place], values[row, place] = k.to(keys.dtype), v.to(values.dtype)
    grouped = q.unflatten(1, (G, H // G))
    scores = torch.einsum("bgnd,bsgd->bgns", grouped, keys.to(q.dtype)) * D**-0.5
    scores = scores if q.dtype == torch.float64 else scores.float()
    visible = torch.arange(S, device=q.device) <= position
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(dim=-1)
    out = torch.einsum("bgns,bsgd->bgnd", weights.to(v.dtype), values.to(v.dtype))
    return out.flatten(1, 2)
