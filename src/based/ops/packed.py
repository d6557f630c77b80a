"""Packed batches: several sequences end to end in one row, `cu_seqlens` their boundaries."""

import torch
from jaxtyping import Int
from torch import Tensor


def sequence_ids(cu_seqlens: Int[Tensor, " E"], length: int) -> Int[Tensor, " T"]:
    """Which sequence each of the `length` tokens belongs to."""
    token = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


def positions(cu_seqlens: Int[Tensor, " E"], length: int) -> Int[Tensor, " T"]:
    """Each token's position in its own sequence, from 0."""
    token = torch.arange(length, device=cu_seqlens.device)
    return token - cu_seqlens[sequence_ids(cu_seqlens, length)]
