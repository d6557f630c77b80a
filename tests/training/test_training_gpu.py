"""Training on a GPU: compiled, in bfloat16, a step ahead of its numbers, and resumed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import CPU, Recorder, numbers

from based.data.prepare import prepare
from based.training import TrainConfig, Trainer
from based.training.hardware import OnItsWay

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


@pytest.mark.parametrize("preset", ["based-tiny", "attn-tiny"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_learns_what_a_cpu_learns(config, tmp_path, preset, compiled) -> None:
    config = replace(config, preset=preset)
    want = train(config, tmp_path / "cpu", CPU)
    got = train(replace(config, compile=compiled), tmp_path / "gpu", GPU)
    assert [step.step for step in got.steps] == list(range(1, 25))
    # Initial weights are drawn on the device, so the two runs only resemble each other.
    for recorder in (want, got):
        assert recorder.steps[-1].loss < 0.7 * recorder.steps[0].loss
    assert got.steps[0].loss == pytest.approx(want.steps[0].loss, rel=0.02)
    assert got.steps[-1].loss == pytest.approx(want.steps[-1].loss, rel=0.15)
    assert got.steps[-1].memory_bytes > 0


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
    plain = train(config, tmp_path / "plain", GPU)
    for change in ({"segment": 50}, {"recompute": True, "compile": True}):
        other = train(replace(config, **change), tmp_path / next(iter(change)), GPU)
        assert other.steps[-1].loss == pytest.approx(plain.steps[-1].loss, rel=0.02)


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
