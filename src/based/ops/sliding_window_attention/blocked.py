"""Sliding-window attention in blocks of queries: memory linear in length, any device.

A block of L queries sees a span of L + window - 1 keys; blocks are a batch axis
of one scaled-dot-product-attention call. With L >= window - 1 only the first
block can meet keys that do not exist, so that all others share one band mask.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from based.ops.packed import sequence_ids

MIN_BLOCK = 64
# Up to here, and two blocks, one masked square costs less than blocks and their padding.
SHORT = 256


def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S H D"],
    v: Float[Tensor, "B S H D"],
    window: int,
    past: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H D"]:
    """As the operator of that name; any device and dtype, and the only one that drops weights."""
    T, P = q.shape[1], k.shape[1] - q.shape[1]
    if T == 0:
        return q
    # A window wider than all keys would only meet padding.
    window = min(window, k.shape[1])
    limit = min(SHORT, 2 * max(MIN_BLOCK, window - 1))
    if limit >= T and P == 0 and past is None and cu_seqlens is None:
        visible = _square(T, window, q.device)
        return _attend(q[:, None], k[:, None], v[:, None], visible, dropout)[:, 0]
    block = min(max(MIN_BLOCK, window - 1), T)
    front = window - 1 - P
    q = _spans(F.pad(q, (0, 0, 0, 0, 0, -T % block)), block, block)
    k, v = (
        _spans(F.pad(x, (0, 0, 0, 0, front, -T % block)), block + window - 1, block) for x in (k, v)
    )
    band = _band(block, window, q.device)
    if cu_seqlens is not None:
        ids = sequence_ids(cu_seqlens, T)
        own = _spans(F.pad(ids, (0, -T % block), value=-1)[None], block, block)
        seen = _spans(F.pad(ids, (front, -T % block), value=-1)[None], block + window - 1, block)
        out = _attend(q, k, v, band & (own[..., None] == seen[..., None, :]), dropout)
    else:
        if past is None:
            past = torch.full((q.shape[0],), P, device=q.device)
        exists = torch.arange(block + window - 1, device=q.device) >= window - 1 - past[:, None]
        head = _attend(q[:, :1], k[:, :1], v[:, :1], band & exists[:, None, None, :], dropout)
        tail = _attend(q[:, 1:], k[:, 1:], v[:, 1:], band, dropout)
        out = torch.cat([head, tail], dim=1)
    return out.flatten(1, 2)[:, :T]


def _spans(x: Tensor, length: int, stride: int) -> Tensor:
    """Overlapping spans of the time axis: [B, T, ...] -> [B, M, length, ...]."""
    return x.unfold(1, length, stride).movedim(-1, 2)


def _square(tokens: int, window: int, device: torch.device) -> Bool[Tensor, "T T"]:
    query = torch.arange(tokens, device=device)[:, None]
    key = torch.arange(tokens, device=device)[None, :]
    return (key <= query) & (key > query - window)


def _band(block: int, window: int, device: torch.device) -> Bool[Tensor, "L S"]:
    query = torch.arange(block, device=device)[:, None]
    key = torch.arange(block + window - 1, device=device)[None, :]
    return (key >= query) & (key < query + window)


def _attend(
    q: Float[Tensor, "B M L H D"],
    k: Float[Tensor, "B M S H D"],
    v: Float[Tensor, "B M S H D"],
    visible: Bool[Tensor, "..."],
    dropout: float,
) -> Float[Tensor, "B M L H D"]:
    """Softmax attention inside each span; `visible` broadcasts to [B, M, L, S]."""
    B, M = q.shape[:2]
    if M == 0:
        return q
    if visible.dim() > 2:
        visible = visible.expand(B, M, -1, -1).flatten(0, 1)[:, None]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
    return out.transpose(1, 2).unflatten(0, (B, M))
