"""Philox 4x32-10, a counter-based generator: draw n of a seed needs no other draw.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). Integers
only, so that every device gives the same bits; `triton.language.randint` is the
same function.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF


def philox(seed: Int[Tensor, " B"], counter: Int[Tensor, " B"]) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64) for each 64-bit seed and 64-bit counter."""
    words = [counter & WORD, (counter >> 32) & WORD, torch.zeros_like(seed), torch.zeros_like(seed)]
    keys = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(ROUNDS):
        # A product of two words wraps in int64, but its two halves come out right.
        even, odd = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        words = [
            ((odd >> 32) & WORD) ^ words[1] ^ keys[0],
            odd & WORD,
            ((even >> 32) & WORD) ^ words[3] ^ keys[1],
            even & WORD,
        ]
        keys = [(key + step) & WORD for key, step in zip(keys, INCREMENTS, strict=True)]
    return tuple(words)


def uniform(seed: Int[Tensor, " B"], counter: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """One float32 in [0, 1) for each seed and counter, a multiple of 2^-24."""
    return (philox(seed, counter)[0] >> 8).to(torch.float32) * 2.0**-24
