"""The scaling benchmark on one process and on two gloo ranks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "training"))

import ranks

from benchmarks import pieces, scaling
from benchmarks.scaling import Options


@pytest.fixture
def options(tmp_path: Path, monkeypatch) -> Options:
    # The ranks have one thread each, and rows of another number are another device's.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return Options(
        gpus=(1, 2),
        models=("based-tiny",),
        length=16,
        micro_batch=1,
        micro_batches=2,
        steps=1,
        long_model="based-tiny",
        long_tokens=96,
        segment=32,
        sequences=2,
        new_tokens=3,
        compile=False,
        device="cpu",
        out=tmp_path,
        scratch=tmp_path / "scratch",
        worker=True,
    )


def test_one_and_two_ranks(options, capsys) -> None:
    scaling.main(options)
    assert scaling.missing(options, 1) == []
    assert len(scaling.missing(options, 2)) == 4
    ranks.run(2, scaling.work, options)
    rows = pieces.read(options.out, "scaling")
    assert len(rows) == 8
    assert scaling.missing(options, 2) == []
    one, two = ([r for r in rows if r["gpus"] == n] for n in (1, 2))
    by_piece = {row["piece"]: (row, other) for row, other in zip(one, two, strict=True)}
    for a, b in by_piece.values():
        assert (a["piece"], a["model"]) == (b["piece"], b["model"])
    a, b = by_piece["long sequence"]
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert a["loss"] == pytest.approx(7.6, abs=0.5)  # log of the vocabulary
    a, b = by_piece["weak scaling"]
    assert (a["step_tokens"], b["step_tokens"]) == (32, 64)
    share = b["tokens_per_second"] / (2 * a["tokens_per_second"])
    assert scaling.efficiency(rows, b) == pytest.approx(share)
    a, b = by_piece["checkpoint"]
    assert a["load_seconds"] is None
    assert b["saved_by"] == 1
    assert b["load_seconds"] > 0
    scaling.show(scaling.Console(width=140), rows)
    assert "that of 1 loaded in" in capsys.readouterr().out
    scaling.plot(rows, options.out / "scaling.png")
    assert (options.out / "scaling.png").stat().st_size > 5000


def test_the_command_of_the_ranks_is_these_options(options) -> None:
    import tyro

    line = scaling.command(options, 4, options.seconds)
    assert line[2:6] == ["torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert tyro.cli(Options, args=line[8:]) == options
