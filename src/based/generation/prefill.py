"""Reading prompts: the parallel form, in chunks, from which decoding goes on."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from based.errors import BasedError
from based.generation.request import Generation
from based.generation.sampling import to_device
from based.models import Decoder, DecoderState

PREFILL_CHUNK = 2048


@torch.no_grad()
def prefill(
    model: Decoder,
    tokens: Int[Tensor, "B T"],
    state: DecoderState,
    mask: Bool[Tensor, "B T"] | None = None,
    chunk: int = PREFILL_CHUNK,
) -> tuple[Float[Tensor, "B V"], DecoderState]:
    """Reads the prompt in chunks; returns each row's next-token logits and the new state.

    `mask` is true on real tokens; of a padded batch all rows must be flush right. A GPU
    is fast on some 32,768 tokens at once, so few rows want a larger `chunk` than many.
    """
    if tokens.shape[1] == 0:
        raise BasedError("the prompt has no tokens; begin with the end-of-text token")
    hidden = None
    for first in range(0, tokens.shape[1], chunk):
        columns = slice(first, first + chunk)
        part = None if mask is None else mask[:, columns]
        hidden, after = model.hidden(tokens[:, columns], state, mask=part)
        assert after is not None
        state = after
    assert hidden is not None
    return model.logits(hidden[:, -1]), state


def read_chunk(model: Decoder, generation: Generation, chunk: int) -> Float[Tensor, "1 C"]:
    """Reads the request's next `chunk` prompt tokens into its `carry`; the last hidden state.

    Chunks begin at multiples of `chunk`, so that they do not depend on other requests.
    """
    end = generation.fed + chunk
    tokens = torch.tensor([generation.prompt[generation.fed : end]])
    if generation.carry is None:
        generation.carry = model.init_state(1, len(generation.prompt))
    hidden, generation.carry = model.hidden(to_device(tokens, model.device), generation.carry)
    generation.fed = min(end, len(generation.prompt))
    return hidden[:, -1]


@torch.no_grad()
def read_together(
    model: Decoder, group: list[Generation]
) -> tuple[Float[Tensor, "N C"], DecoderState]:
    """Reads whole prompts, packed end to end; their last hidden states, and a row for each."""
    lengths = torch.tensor([0, *(len(generation.prompt) for generation in group)])
    edges = to_device(lengths.cumsum(0), model.device)
    tokens = torch.tensor([[token for generation in group for token in generation.prompt]])
    hidden, state = model.begin_packed(to_device(tokens, model.device), edges)
    return hidden[0, edges[1:] - 1], state
