"""Prefill a prompt in chunks, then feed back one token at a time.

What a sequence costs in memory is its `DecoderState`: of fixed size for a Based
model, whatever the length of the prompt or of the text generated.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from based.errors import BasedError
from based.generation.sampling import Sampling, sample
from based.models import Decoder, DecoderState

PREFILL_CHUNK = 2048


@torch.no_grad()
def prefill(
    model: Decoder,
    tokens: Int[Tensor, "B T"],
    state: DecoderState,
    mask: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B V"], DecoderState]:
    """Reads the prompt in chunks; returns each row's next-token logits and the new state.

    `mask` is true on real tokens; of a padded batch all rows must be flush right.
    """
    if tokens.shape[1] == 0:
        raise BasedError("the prompt has no tokens; begin with the end-of-text token")
    hidden = None
    for first in range(0, tokens.shape[1], PREFILL_CHUNK):
        chunk = slice(first, first + PREFILL_CHUNK)
        part = None if mask is None else mask[:, chunk]
        hidden, after = model.hidden(tokens[:, chunk], state, mask=part)
        assert after is not None
        state = after
    assert hidden is not None
    return model.logits(hidden[:, -1]), state


def stream(model: Decoder, prompt: Sequence[int], sampling: Sampling, eos_id: int) -> Iterator[int]:
    """Yields new token ids one by one, until the end-of-text token or `max_new_tokens`.

    An empty prompt begins a new document, as if it were one end-of-text token.
    """
    generator = sampling.generator(model.device)
    tokens = torch.tensor([list(prompt) or [eos_id]], device=model.device)
    _check_ids(model, tokens)
    logits, state = prefill(model, tokens, model.init_state(1))
    for count in range(1, sampling.max_new_tokens + 1):
        token = sample(logits[0], sampling, generator)
        if int(token) == eos_id:
            return
        yield int(token)
        if count < sampling.max_new_tokens:
            logits = model.step(token[None], state)


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_id: int
) -> list[list[int]]:
    """New token ids for each prompt, all decoded together; each as if it were alone.

    Row i samples with seed `sampling.seed + i`. Prompts may differ in length.
    """
    if not prompts:
        return []
    tokens, mask = _pad_left([list(prompt) or [eos_id] for prompt in prompts], eos_id)
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    _check_ids(model, tokens)
    generators = [
        torch.Generator(model.device).manual_seed(sampling.seed + row)
        for row in range(len(prompts))
    ]
    logits, state = prefill(model, tokens, model.init_state(len(prompts)), mask)
    outputs: list[list[int]] = [[] for _ in prompts]
    alive = [True] * len(prompts)
    for _ in range(sampling.max_new_tokens):
        drawn = [sample(row, sampling, g) for row, g in zip(logits, generators, strict=True)]
        for row, token in enumerate(drawn):
            alive[row] = alive[row] and int(token) != eos_id
            if alive[row]:
                outputs[row].append(int(token))
        if not any(alive):
            break
        logits = model.step(torch.stack(drawn), state)
    return outputs


def _pad_left(prompts: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[fill] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
    return tokens, mask


def _check_ids(model: Decoder, tokens: Tensor) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.config.vocab_size:
        raise BasedError(
            f"the prompt holds token id {high if low >= 0 else low}, but the model's vocabulary is "
            f"0 .. {model.config.vocab_size - 1}; use the tokenizer that the model was trained with"
        )
