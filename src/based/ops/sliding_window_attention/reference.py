"""The mathematics, in quadratic time. Every fast path is tested against this."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sliding_window_attention_reference(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S H D"],
    v: Float[Tensor, "B S H D"],
    window: int,
    past: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """softmax(q k^T / sqrt(D)) v over the last `window` keys of each query.

    k and v hold P = S - T past keys and then the T keys beside the queries. Of
    row b's past keys only the last `past[b]` exist (all P when not given).
    """
    P = k.shape[1] - q.shape[1]
    query = torch.arange(q.shape[1], device=q.device)[:, None] + P
    key = torch.arange(k.shape[1], device=q.device)[None, :]
    visible = (key <= query) & (key > query - window)
    if past is not None:
        visible = visible & (key >= P - past[:, None, None])
    scores = torch.einsum("bthd,bihd->bhti", q, k) * q.shape[-1] ** -0.5
    visible = visible.expand(q.shape[0], -1, -1)[:, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhti,bihd->bthd", weights, v)
