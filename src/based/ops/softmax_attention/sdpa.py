"""Causal softmax attention through torch's scaled-dot-product attention."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

# Queries taken at a time against a cache: bounds the mask to QUERIES x keys.
QUERIES = 1024


def softmax_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S G D"],
    v: Float[Tensor, "B S G D"],
    past: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """Causal attention, as `reference.py` defines it; without `past` row 0 of q meets key 0.

    H is a multiple of G: equal groups of query heads share a head of keys and values.
    """
    shared = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if past is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared).transpose(
            1, 2
        )
    key = torch.arange(k.shape[2], device=q.device)
    outs = []
    for first in range(0, q.shape[2], QUERIES):
        part = q[:, :, first : first + QUERIES]
        query = past[:, None] + first + torch.arange(part.shape[2], device=q.device)
        visible = (key <= query[..., None])[:, None]
        outs.append(
            F.scaled_dot_product_attention(part, k, v, attn_mask=visible, enable_gqa=shared)
        )
    return torch.cat(outs, dim=2).transpose(1, 2)
