"""A run that is killed a hundred times, at random, is the run that never was."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_training import assert_bitwise

from based.data.prepare import prepare

SCRIPT = """
import sys
from pathlib import Path
import torch
from based.training import TrainConfig, Trainer
sys.path.insert(0, {tests!r})
from test_training import Recorder
torch.set_num_threads(1)
config = TrainConfig(Path(sys.argv[1]), steps=600, batch_size=2, length=32, warmup_steps=3,
                     evaluate_every=50, checkpoint_every=2)
print("begun", flush=True)
Trainer(config, Path(sys.argv[2]), Recorder(), torch.device("cpu")).train()
"""


@pytest.mark.soak
def test_a_hundred_kills(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat, and the dog saw the cat. " * 400)
    prepare([tmp_path / "a.txt"], tmp_path / "data", 280)
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    chance, kills = random.Random(0), 0

    def start(folder: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(tmp_path / "data"), str(tmp_path / folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    while kills < 100:
        with start("killed") as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0.05, 0.9))
            if process.poll() is not None:
                break
            process.kill()
        kills += 1
    with start("killed") as process:
        assert process.wait() == 0
    with start("whole") as process:
        assert process.wait() == 0
    assert kills == 100, f"finished after {kills} kills; give the run more steps"
    assert_bitwise(tmp_path / "whole", tmp_path / "killed")
