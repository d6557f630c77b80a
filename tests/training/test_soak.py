"""A run that is killed a hundred times, at random, is the run that never was."""

import json
import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import ranks
from test_training import CPU, Recorder, numbers

from based.data.prepare import prepare
from based.training import TrainConfig, Trainer
from based.training.parallel import join_job

KILLS = 100


def job(data: Path, run: Path, until: int | None = None) -> None:
    """A run without end to speak of, a checkpoint every second step; it may stop by itself."""
    join_job("cpu")
    config = TrainConfig(
        data=data,
        batch_size=4,
        length=32,
        warmup_steps=3,
        steps=10_000,
        evaluate_every=20,
        evaluate_windows=4,
        checkpoint_every=2,
    )
    recorder = Recorder(lambda step: setattr(trainer, "stop_requested", step.step == until))
    trainer = Trainer(config, run, recorder, CPU)
    trainer.train()


def random_moment(chance: random.Random, run: Path, processes: list[BaseProcess]) -> None:
    """Sleeps into the start of the ranks, or into some step after it and its checkpoint."""
    steps = chance.randrange(5)
    before = rows_of(run)
    while steps and rows_of(run) < before + steps:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.5 if steps else 2))


def rows_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"learning_rate"') if path.exists() else 0


def saved(run: Path) -> dict[str, list[int]]:
    """Size and checksum of each rank's weights, optimiser and random state at the end."""
    manifest = json.loads((max(run.glob("checkpoints/step-*")) / "manifest.json").read_text())
    return {name: sums for name, sums in manifest["files"].items() if name.endswith(".distcp")}


@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_hundred_kills(tmp_path, size, record_property) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat, and the dog saw the cat. " * 400)
    prepare([tmp_path / "a.txt"], tmp_path / "data", 280)
    chance, newest = random.Random(size), 0
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    for _ in range(KILLS):
        processes, _ = ranks.start(size, job, tmp_path / "data", killed)
        random_moment(chance, killed, processes)
        chance.choice(processes).kill()
        for process in processes:
            process.terminate()  # as torchrun does
            process.join(30)
            assert not process.is_alive()
        steps = max((int(p.name[5:]) for p in killed.glob("checkpoints/step-*")), default=0)
        assert steps >= newest, "a checkpoint was lost"
        newest = steps
    for run in (killed, whole):
        ranks.run(size, job, tmp_path / "data", run, newest + 10, seconds=1000)
    assert numbers(whole) == numbers(killed)
    assert saved(whole) == saved(killed)
    record_property("kills", KILLS)
    record_property("steps", newest)
