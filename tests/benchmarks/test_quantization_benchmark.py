"""What eight-bit weights cost, on a tiny model."""

from pathlib import Path

import torch

from based.data.prepare import prepare
from based.models import Decoder, preset
from based.models.checkpoint import save_model
from benchmarks import quantization, rows


def test_each_precision_is_a_row(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat, and the dog saw the cat. " * 200)
    prepare([tmp_path / "a.txt"], tmp_path / "data", 280, validation_fraction=0.3)
    torch.manual_seed(0)
    save_model(Decoder(preset("based-tiny", vocab_size=280)), tmp_path / "model")
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    options = quantization.Options(tmp_path / "model", tmp_path / "data", length=32, device="cpu")
    quantization.main(options)
    plain, *others = rows.read_rows("quantization")
    assert (plain["weights"], plain["difference"]) == ("as saved", 0.0)
    assert [row["weights"] for row in others] == ["int8", "float8"]
    for row in others:
        assert 0 < abs(row["difference"]) < 0.02
        assert row["tokens"] == plain["tokens"]
    assert "float8" in capsys.readouterr().out
