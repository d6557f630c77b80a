"""What a kernel reads of a weight: its numbers and, where they are eight bits, a scale a row."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


class Rows(NamedTuple):
    """W = scale * values, row by row."""

    values: Float[Tensor, "N C"]
    scale: Float[Tensor, " N"] | None


def rows_of(weight: Tensor) -> Rows | None:
    """A plain weight as it is, torchao's weight-only eight-bit ones taken apart; None for others.

    GPUs before compute capability 8.9 have no float8.
    """
    if type(weight) in (Tensor, nn.Parameter):
        return Rows(weight, None)
    values, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if values is None or scale is None or getattr(weight, "act_quant_kwargs", None) is not None:
        return None
    if values.dtype not in EIGHT_BITS or scale.numel() != weight.shape[0]:
        return None
    old = values.is_cuda and torch.cuda.get_device_capability(values.device) < (8, 9)
    if old and values.dtype == torch.float8_e4m3fn:
        return None
    return Rows(values, scale.view(-1))
