"""One entry for all devices: the kernel on a GPU, the sorted reference elsewhere."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from based.ops.kernels import use_kernels
from based.ops.token_sampling.drawn import Drawn, Outbox
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


def sample_tokens(
    logits: Float[Tensor, "B V"],
    rows: SamplingRows,
    into: Drawn | None = None,
    outbox: Outbox | None = None,
    peaks: Float[Tensor, "B P 4"] | None = None,
) -> Drawn:
    """Draws the next token of every row, as `reference.py` defines it, and counts the draw.

    Written over `into` if that is given; a kernel posts it to `outbox` too. Never waits for a GPU.
    `peaks` save a kernel its first pass: of parts of a row the largest logit, the sum of exp of
    others less it, its id (as bits), and how many are not finite.
    """
    if into is None:
        into = Drawn.empty(logits.shape[0], logits.device)
    if use_kernels(logits):
        from based.ops.token_sampling.decode import sample_tokens_kernel

        sample_tokens_kernel(logits, *rows, into.tokens, into.logprobs, outbox, peaks)
    else:
        tokens, logprobs = sample_tokens_reference(logits, *rows)
        into.tokens.copy_(tokens)
        into.logprobs.copy_(logprobs)
        rows.position.add_(1)
    return into
