"""Every registered mixer as the mixer of a language model: initialised, trained, saved, stepped."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from based.models import Decoder, DecoderConfig, load_model, save_model
from tests.mixers.test_every_mixer import SIZE, every_mixer


def decoder(name: str, options: dict[str, int | float | str]) -> Decoder:
    return Decoder(
        DecoderConfig(
            vocab_size=30,
            hidden_size=SIZE,
            intermediate_size=32,
            mixers=(name, name),
            mixer_options={name: options},
        )
    )


@every_mixer
def test_every_parameter_is_initialised_and_learns(name, options) -> None:
    model, tokens = decoder(name, options), torch.randint(0, 30, (4, 20))
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(8):
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert losses[0] == pytest.approx(math.log(30), abs=0.3)
    assert losses[-1] < losses[0] - 0.15


@every_mixer
def test_saved_and_loaded_through_the_meta_device(name, options, tmp_path: Path) -> None:
    model, tokens = decoder(name, options).eval(), torch.randint(0, 30, (2, 11))
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    torch.testing.assert_close(loaded(tokens)[0], model(tokens)[0], rtol=0, atol=0)


@every_mixer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 5e-2)])
def test_prefill_and_steps_are_the_whole(name, options, dtype, tolerance) -> None:
    model, tokens = decoder(name, options).to(dtype).eval(), torch.randint(0, 30, (2, 14))
    whole, _ = model(tokens)
    _, state = model(tokens[:, :6], model.init_state(2))
    for t in range(6, 14):
        got = model.step(tokens[:, t], state)
        torch.testing.assert_close(got, whole[:, t], rtol=0, atol=tolerance)


@every_mixer
def test_trains_under_autocast(name, options) -> None:
    model, tokens = decoder(name, options), torch.randint(0, 30, (2, 30))
    want, _ = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = model(tokens)
        got.float().square().sum().backward()
    # The median, as a few tokens of the identity map stand on denominators near zero.
    assert (got.float() - want).abs().median() < 2e-3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
