"""A self-check of a converted model: its weights are finite and its forms agree."""

from __future__ import annotations

import torch

from based.errors import BasedError
from based.models.decoder import Decoder

# Longer than the published windows of 65 and 129 keys, so that their rings turn over.
LENGTH, PREFILL = 160, 140
TOLERANCE = 1e-3


@torch.no_grad()
def verify(model: Decoder) -> float:
    """Largest difference of logits, whole sequence against prefill and steps, over their spread.

    In float32, on random tokens. Raises `BasedError` if it is above 1e-3, or if a
    weight is not finite.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise BasedError(f"{name} holds values that are not finite; the checkpoint is damaged")
    dtype, model = model.dtype, model.float()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, LENGTH), generator=generator)
    whole, _ = model(tokens)
    first, state = model(tokens[:, :PREFILL], model.init_state(1))
    assert state is not None
    pieces = [first, *(model.step(tokens[:, t], state)[:, None] for t in range(PREFILL, LENGTH))]
    error = float((torch.cat(pieces, 1) - whole).abs().max() / whole.std())
    model.to(dtype)
    if not error < TOLERANCE:
        raise BasedError(f"the converted model's steps are {error:.1e} off its parallel form")
    return error
