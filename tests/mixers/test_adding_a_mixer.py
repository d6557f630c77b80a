"""docs/adding_a_mixer.md, followed to the letter: one file, one registry line."""

import re
import sys
from pathlib import Path

import pytest
import torch

from based.mixers import MIXERS
from based.models import Decoder, DecoderConfig

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_mixer.md"


def test_the_page_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[:2]
    (tmp_path / "decaying_average.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    name, path = re.findall(r'"([^"]+)"', line)
    monkeypatch.setitem(MIXERS, name, path.replace("based.mixers.", ""))

    config = DecoderConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, mixers=(name, "gated_convolution")
    )
    model, tokens = Decoder(config).double(), torch.randint(0, 20, (1, 12))
    whole, _ = model(tokens)
    _, state = model(tokens[:, :5], model.init_state(1))
    assert state is not None
    for t in range(5, 12):
        torch.testing.assert_close(model.step(tokens[:, t], state), whole[:, t])
    edges = torch.tensor([0, 7, 12])
    packed, _ = model(tokens, cu_seqlens=edges)
    torch.testing.assert_close(packed[:, 7:], model(tokens[:, 7:])[0])
    sys.modules.pop("decaying_average")
