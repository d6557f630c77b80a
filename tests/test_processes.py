"""Workers of a killed command end with it, at work or waiting for it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SWEEP = """
import multiprocessing, pathlib, sys, time
from dataclasses import replace
from based.recall.sweep import Job
from based.recall.workers import local_workers
from tests.recall.test_sweep import POINTS, RECIPE

if __name__ == "__main__":
    endless = replace(RECIPE, epochs=10**9, stop_above=2.0)
    with local_workers(1) as submit:
        submit(Job(POINTS[0], endless, pathlib.Path(sys.argv[1]), float("inf"), threads=1))
        print(multiprocessing.active_children()[0].pid, flush=True)
        time.sleep(600)
"""
ENCODING = """
import multiprocessing, time
from based.data import train_tokenizer
from based.data.documents import Piece
from based.data.encoding import encode

def batches():
    for _ in range(20):
        yield (Piece("some text", True),)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    for _ in encode(batches(), train_tokenizer(["some text"] * 9, 300), processes=2):
        pass
"""


@pytest.mark.parametrize("code", [SWEEP, ENCODING], ids=["sweep", "encoding"])
def test_a_killed_command_takes_its_workers_along(code: str, tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(tmp_path / "running")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as killed:
        assert killed.stdout is not None
        worker = int(killed.stdout.readline())
        # Long enough for the worker to be at work.
        time.sleep(5)
        assert is_running(worker)
        killed.kill()
    end = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only its entry in the table."""
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:  # not Linux
        return True
    except ProcessLookupError:
        return False
