"""Runs the decode kernels' tests (`decode_kernels.py`) in Triton's interpreter, or on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL_TESTS = Path(__file__).with_name("decode_kernels.py")


def run(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", str(KERNEL_TESTS), "-p", "no:cacheprovider"]
    # Triton reads its setting when it is first imported, so in a process of its own.
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_in_the_interpreter() -> None:
    run(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    run()
