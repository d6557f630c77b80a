"""The mathematics, in quadratic memory. Every fast path is tested against this."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def softmax_attention_reference(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S H D"],
    v: Float[Tensor, "B S H D"],
    past: Int[Tensor, " B"],
) -> Float[Tensor, "B T H D"]:
    """softmax(q k^T / sqrt(D)) v; query t of row b stands at position past[b] + t.

    It sees the keys at positions up to its own; later slots of k and v are unused.
    """
    query = past[:, None, None] + torch.arange(q.shape[1], device=q.device)[:, None]
    key = torch.arange(k.shape[1], device=q.device)
    scores = torch.einsum("bthd,bihd->bhti", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~(key <= query)[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhti,bihd->bthd", weights, v)
