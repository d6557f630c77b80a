"""docs/generation.md, every block of Python in order, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch

from based.data import train_tokenizer
from based.models import Decoder, preset, save_model

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run" / "model"
    tokenizer = train_tokenizer(["My fellow citizens of the Senate. " * 30], 280)
    torch.manual_seed(0)
    save_model(Decoder(preset("based-tiny", vocab_size=tokenizer.vocab_size)), folder)
    tokenizer.save(folder / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["request"].finish_reason == "cancelled"
    assert [r.finish_reason for r in names["requests"]] == ["length"] * 3
    assert len(names["answer"].tokens) == 40
    assert "length 40 -" in capsys.readouterr().out
