"""Error of the decode step's state against float64, as tokens go by.

One head, random queries, keys and values with a mean, as trained models have. What
is stored between steps is float32 or bfloat16, written every token or every
sixteenth (the deferred step), or float32 in halves, of which steps read one; the
reference is the chunked form in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from based.ops.taylor_linear_attention import (
    num_features,
    split_halves,
    taylor_linear_attention,
    taylor_linear_attention_deferred_step,
    taylor_linear_attention_step,
)

K, V = 16, 64
# Tokens at the end of each piece whose outputs are compared.
COMPARED = 64
Stored = Literal["float32", "bfloat16", "halves"]


def step_errors(
    marks: list[int], stored: Stored, recent: int, device: str = "cpu", heads: int = 1
) -> list[float]:
    """Relative error of the outputs just before each mark (a number of tokens)."""
    generator = torch.Generator(device).manual_seed(0)
    numerator = torch.zeros(1, heads, num_features(K), V, device=device)
    if stored == "halves":
        numerator = split_halves(numerator)
    elif stored == "bfloat16":
        numerator = numerator.bfloat16()
    state = [numerator, torch.zeros(1, heads, num_features(K), device=device)]
    if recent:
        state += [torch.zeros(1, recent, heads, D, device=device) for D in (K, V)]
        state.append(torch.zeros(1, dtype=torch.long, device=device))
    step = taylor_linear_attention_deferred_step if recent else taylor_linear_attention_step
    exact: list[Tensor] = []
    errors, done = [], 0
    for mark in marks:
        got = want = torch.empty(0)
        while done < mark:
            length = min(16_384, mark - done)
            q, k, v = (
                torch.randn(1, length, heads, D, generator=generator, device=device) + mean
                for D, mean in ((K, 0.0), (K, 0.1), (V, 0.5))
            )
            want, *exact = taylor_linear_attention(q.double(), k.double(), v.double(), *exact)
            outs = []
            for t in range(length):
                outs.append(step(q[:, t], k[:, t], v[:, t], *state))
                if recent:
                    state[-1] += 1
            got = torch.stack(outs, 1)
            done += length
        last = slice(-COMPARED, None)
        difference = got[:, last].double() - want[:, last]
        errors.append((difference.norm() / want[:, last].norm()).item())
    return errors
