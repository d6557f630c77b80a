"""Causal softmax attention through torch's scaled-dot-product attention."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from based.ops.lanes import lanes_as_rows

# Queries taken at a time against a cache: bounds the mask to QUERIES x keys.
QUERIES = 1024


def softmax_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S G D"],
    v: Float[Tensor, "B S G D"],
    past: Int[Tensor, " B"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H D"]:
    """Causal attention, as `reference.py` defines it; without `past` row 0 of q meets key 0.

    H is a multiple of G: equal groups of query heads share a head of keys and values.
    `dropout` is the probability with which each attention weight is dropped.
    """
    if past is None and dropout:
        return _causal_with_dropout(q, k, v, dropout)
    return _attend(q, k, v, past, dropout)


def _causal_with_dropout(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """With random numbers that do not depend on the inputs: lanes under vmap share them."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bihd->bhti", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    keep = torch.rand(weights.shape, device=q.device) >= dropout
    return torch.einsum("bhti,bihd->bthd", weights * (keep / (1 - dropout)).to(v.dtype), v)


@lanes_as_rows
def _attend(q: Tensor, k: Tensor, v: Tensor, past: Tensor | None, dropout: float) -> Tensor:
    shared = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if past is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        return out.transpose(1, 2)
    key = torch.arange(k.shape[2], device=q.device)
    outs = []
    for first in range(0, q.shape[2], QUERIES):
        part = q[:, :, first : first + QUERIES]
        query = past[:, None] + first + torch.arange(part.shape[2], device=q.device)
        visible = (key <= query[..., None])[:, None]
        outs.append(
            F.scaled_dot_product_attention(
                part, k, v, attn_mask=visible, dropout_p=dropout, enable_gqa=shared
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2)
