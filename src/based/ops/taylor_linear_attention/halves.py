"""A float32 numerator as halves of its bits: a decode step reads the upper ones alone.

An upper half is read as the middle of the numbers that have it, a relative error of at most
2^-9: less than bfloat16 outputs lose when they are stored, and it does not add up, since a
fold of recent tokens reads and writes all 32 bits.
"""

import torch
from jaxtyping import Float, Int16
from torch import Tensor

_MIDDLE = -(1 << 15)


def split(numerator: Float[Tensor, "... F V"]) -> Int16[Tensor, "... 2 F V"]:
    """Upper, then lower 16 bits of each float32."""
    lower, upper = numerator.contiguous().view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((upper, lower), -3)


def join(halves: Int16[Tensor, "... 2 F V"]) -> Float[Tensor, "... F V"]:
    """The float32 numbers that were split, bit for bit."""
    upper, lower = halves.unbind(-3)
    return torch.stack((lower, upper), -1).view(torch.float32).squeeze(-1)


def read(halves: Int16[Tensor, "... 2 F V"]) -> Float[Tensor, "... F V"]:
    """What a step takes the numbers to be, from their upper halves."""
    upper = halves.select(-3, 0)
    return join(torch.stack((upper, torch.full_like(upper, _MIDDLE)), -3))
