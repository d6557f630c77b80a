"""A run that is killed a hundred times, at random, is the run that never was."""

import os
import random
import time
from pathlib import Path

import pytest
import ranks
from test_training import CPU, Recorder, assert_bitwise

from based.data.prepare import prepare
from based.training import TrainConfig, Trainer
from based.training.parallel import join_job


def job(data: Path, run: Path) -> bool:
    """Trains a little slowly: 2,000 steps, a checkpoint every second one."""
    join_job("cpu")
    options = {"batch_size": 2, "length": 32, "warmup_steps": 3, "steps": 2000}
    config = TrainConfig(data, evaluate_every=50, checkpoint_every=2, **options)
    return Trainer(config, run, Recorder(), CPU).train() is not None


@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_hundred_kills(tmp_path, size) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat, and the dog saw the cat. " * 400)
    prepare([tmp_path / "a.txt"], tmp_path / "data", 280)
    chance, kills, steps = random.Random(0), 0, 0
    killed = tmp_path / "killed"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    while kills < 100:
        processes, _ = ranks.start(size, job, tmp_path / "data", killed)
        time.sleep(chance.uniform(0.1, 0.9))
        if all(not process.is_alive() for process in processes):
            break
        chance.choice(processes).kill()
        for process in processes:
            process.terminate()  # as torchrun does
            process.join(30)
            assert not process.is_alive()
        kills += 1
        newest = max((int(p.name[5:]) for p in killed.glob("checkpoints/step-*")), default=0)
        assert newest >= steps, "a checkpoint was lost"
        steps = newest
    assert kills == 100, f"finished after {kills} kills; give the run more steps"
    assert ranks.run(size, job, tmp_path / "data", killed, seconds=600)[0]
    assert ranks.run(size, job, tmp_path / "data", tmp_path / "whole", seconds=600)[0]
    assert_bitwise(tmp_path / "whole", killed)
