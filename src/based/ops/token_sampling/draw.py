"""One entry for all devices: the kernel on a GPU, the sorted reference elsewhere."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.kernels import use_kernels
from based.ops.precision import state_dtype
from based.ops.token_sampling.reference import sample_tokens_reference


class SamplingRows(NamedTuple):
    """How each row is sampled; all tensors on the logits' device.

    `top_k` is the vocabulary's size, or more, where it does not cut. `position`
    counts the draws of the row's request, and goes up by one with each: with its seed
    it determines the draw, whatever stands in other rows.
    """

    temperature: Float[Tensor, " B"]
    top_k: Int[Tensor, " B"]
    top_p: Float[Tensor, " B"]
    seed: Int[Tensor, " B"]
    position: Int[Tensor, " B"]

    def first(self, rows: int) -> "SamplingRows":
        """Views of the first rows."""
        return SamplingRows(*(tensor[:rows] for tensor in self))


class Drawn(NamedTuple):
    """A token id a row, and its log-probability: NaN where the logits were not finite."""

    tokens: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]


def sample_tokens(
    logits: Float[Tensor, "B V"], rows: SamplingRows, into: Drawn | None = None
) -> Drawn:
    """Draws the next token of every row, as `reference.py` defines it, and counts the draw.

    Written over `into` if that is given. Never waits for a GPU.
    """
    if into is None:
        tokens = torch.empty_like(rows.position)
        into = Drawn(tokens, torch.empty_like(tokens, dtype=state_dtype(logits.dtype)))
    if use_kernels(logits):
        from based.ops.token_sampling.decode import sample_tokens_kernel

        sample_tokens_kernel(logits, *rows, *into)
    else:
        for own, drawn in zip(into, sample_tokens_reference(logits, *rows), strict=True):
            own.copy_(drawn)
        rows.position.add_(1)
    return into
