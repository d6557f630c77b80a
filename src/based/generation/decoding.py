"""Generation in one call, on an engine of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from based.data.tokenizer import Tokenizer
from based.generation.config import EngineConfig
from based.generation.engine import Engine
from based.generation.quantization import Precision
from based.generation.sampling import Sampling
from based.models import Decoder

# Sequences that `generate` decodes at once, at most.
MOST_SLOTS = {"cpu": 32, "cuda": 256}


def stream(model: Decoder, prompt: Sequence[int], sampling: Sampling, eos_id: int) -> Iterator[int]:
    """Yields new token ids one by one, until the end-of-text token or `max_new_tokens`.

    An empty prompt begins a new document, as if it were one end-of-text token.
    """
    engine = Engine(model, _config([prompt], sampling, 1), eos_id=eos_id)
    yield from engine.stream(engine.submit(prompt, sampling))


def stream_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    quantize: Precision | None = None,
) -> Iterator[str]:
    """Yields the continuation of `prompt` in pieces, as soon as each is certain.

    With `quantize` the model's weights are eight-bit ones from then on.
    """
    tokens = tokenizer.encode(prompt)
    config = replace(_config([tokens], sampling, 1), quantize=quantize)
    engine = Engine(model, config, tokenizer=tokenizer)
    yield from engine.stream_text(engine.submit(tokens, sampling))


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_id: int
) -> list[list[int]]:
    """New token ids for each prompt, decoded together; each as if it were alone.

    Row i samples with seed `sampling.seed + i`. Prompts may differ in length.
    """
    if not prompts:
        return []
    slots = min(len(prompts), MOST_SLOTS.get(model.device.type, 32))
    config = replace(_config(prompts, sampling, slots), max_waiting=len(prompts))
    engine = Engine(model, config, eos_id=eos_id)
    requests = [
        engine.submit(prompt, replace(sampling, seed=sampling.seed + row))
        for row, prompt in enumerate(prompts)
    ]
    while engine.busy:
        engine.step()
    for request in requests:
        request.raise_error()
    return [request.tokens for request in requests]


def _config(prompts: Sequence[Sequence[int]], sampling: Sampling, slots: int) -> EngineConfig:
    longest = max(1, *(len(prompt) for prompt in prompts), 1)
    return EngineConfig(slots=slots, max_length=longest + sampling.max_new_tokens)
