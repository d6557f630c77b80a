"""The prefill benchmark, with shapes for a CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from based.models import Decoder, preset
from benchmarks import pieces, prefill
from benchmarks.prefill import Options


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        models=("based-tiny", "attn-tiny"),
        lengths=(32, 16),
        tokens=64,
        repeats=2,
        compile=False,
        device="cpu",
        out=tmp_path,
        worker=True,
    )


def test_each_piece_is_measured_once(options, capsys) -> None:
    prefill.main(replace(options, models=("based-tiny",), seconds=-1))
    assert pieces.read(options.out, "prefill") == []
    prefill.main(options)
    rows = pieces.read(options.out, "prefill")
    assert [(row["model"], row["length"], row["batch"]) for row in rows] == [
        *(("based-tiny", 32, 2), ("based-tiny", 16, 4)),
        *(("attn-tiny", 32, 2), ("attn-tiny", 16, 4)),
    ]
    for row in rows:
        assert 0 < row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
        assert 0 < row["floor_ms"] < row["floor_with_moves_ms"]
    prefill.main(replace(options, worker=False))
    assert pieces.read(options.out, "prefill") == rows
    prefill.show(Console(width=120), [{**rows[0], "by_kind": {"matrix products": 0.0}}])
    out = capsys.readouterr().out
    assert "2 x 32" in out
    assert "based-tiny at 32: matrix products 0%, idle 100%" in out
    named = [{**row, "model": row["model"].replace("tiny", "360m")} for row in rows]
    prefill.plot(named, options.out / "prefill.png")
    assert (options.out / "prefill.png").stat().st_size > 5000


def test_the_floor_counts_every_product() -> None:
    net = Decoder(preset("based-tiny"))
    rates = prefill.matmul_rate(torch.device("cpu")), prefill.copy_rate(torch.device("cpu"))
    found = prefill.floor(net, 1000, 100, torch.device("cpu"))
    # 4 blocks of width 96: SwiGLU 6 d^2 each, convolution 6 d^2 twice, attention 4 d^2 and
    # 2 d^2 + 128 d; mixing on top, and three weights of each convolution's channels.
    matrices = 96 * 96 * (4 * 6 + 2 * 6 + 4 + 2) + 2 * 96 * 64 + 2 * 3 * 192
    mixing = sum(mixer.mixing_flops(100) for mixer in net.mixers())
    assert found["floor_ms"] == pytest.approx(1e6 * (2 * matrices + mixing) / rates[0])
    moved = found["floor_with_moves_ms"] - found["floor_ms"]
    assert moved * 1e-3 * rates[1] > 4 * 1000 * 4 * 96 * (1 + 4 + 2 + 1)


def test_the_command_of_a_process_is_these_options(options, monkeypatch) -> None:
    import tyro

    line = pieces.arguments(options, seconds=5.0)
    assert tyro.cli(Options, args=line) == replace(options, seconds=5.0)
    ran = []
    monkeypatch.setattr(pieces.subprocess, "run", lambda command, check: ran.append(command))
    pieces.each_in_a_process("prefill", options, ("a", "b"), Console())
    assert [command[1:3] for command in ran] == [["-m", "benchmarks.prefill"]] * 2
    assert ran[1][ran[1].index("--models") + 1] == "b"
    pieces.each_in_a_process("prefill", replace(options, seconds=0.0), ("c",), Console())
    assert len(ran) == 2
