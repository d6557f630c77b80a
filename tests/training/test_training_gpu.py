"""Training on a GPU: compiled, in bfloat16, a step ahead of its numbers, and resumed."""

from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from test_training import CPU, Recorder, numbers

from based.data.prepare import prepare
from based.training import TrainConfig, Trainer
from based.training.hardware import OnItsWay
from based.training.metrics import read_metrics

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("the cat sat on the mat, and the dog saw the cat. " * 400)
    prepare([folder / "a.txt"], folder / "out", 280)
    return TrainConfig(
        data=folder / "out",
        steps=24,
        batch_size=4,
        micro_batch=2,
        length=128,
        warmup_steps=3,
        evaluate_every=12,
        checkpoint_every=8,
    )


def train(config: TrainConfig, folder: Path, device: torch.device, stop: int = 0) -> Recorder:
    def interrupt(step) -> None:
        if step.step == stop:
            raise InterruptedError

    recorder = Recorder(interrupt)
    Trainer(config, folder, recorder, device).train()
    return recorder


def losses(config: TrainConfig, folder: Path, device: torch.device) -> list[float]:
    return [step.loss for step in train(config, folder, device).steps]


def trained(config: TrainConfig, folder: Path, device: torch.device = GPU) -> list[float]:
    """In a process where types are not checked, which a compiler cannot follow."""
    return ranks.run(1, losses, config, folder, device, seconds=300)[0]


@pytest.mark.parametrize("preset", ["based-tiny", "attn-tiny"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_learns_what_a_cpu_learns(config, tmp_path, preset, compiled) -> None:
    config = replace(config, preset=preset)
    want = trained(config, tmp_path / "cpu", CPU)
    got = trained(replace(config, compile=compiled), tmp_path / "gpu")
    # Initial weights are drawn on the device, so the two runs only resemble each other.
    assert len(got) == len(want) == 24
    assert got[0] == pytest.approx(want[0], rel=0.02)
    assert got[-1] == pytest.approx(want[-1], rel=0.15)
    assert got[-1] < 0.7 * got[0]
    rows = read_metrics(tmp_path / "gpu" / "metrics.jsonl")
    assert all(row["memory_bytes"] > 0 for row in rows if "loss" in row)


def test_interrupted_it_goes_on_where_it_was(config, tmp_path) -> None:
    train(config, tmp_path / "whole", GPU)
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "cut", GPU, stop=13)
    recorder = train(config, tmp_path / "cut", GPU)
    assert recorder.messages == ["going on from the checkpoint of step 8"]
    losses = [
        [row["loss"] for row in numbers(tmp_path / name) if "loss" in row]
        for name in ("whole", "cut")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_segments_and_recomputation_change_little(config, tmp_path) -> None:
    plain = trained(config, tmp_path / "plain")
    for change in ({"segment": 50}, {"recompute": True, "compile": True}):
        other = trained(replace(config, **change), tmp_path / next(iter(change)))
        assert other[-1] == pytest.approx(plain[-1], rel=0.02)


def test_numbers_come_without_waiting() -> None:
    for _ in range(2):  # allocations wait
        OnItsWay(torch.ones(2, device=GPU, dtype=torch.float64)).collect()
    busy = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    busy.record()
    numbers = OnItsWay(torch.ones(2, device=GPU, dtype=torch.float64))
    assert not busy.query()
    assert numbers.collect() == [1.0, 1.0]
    assert busy.query()
