"""The GPU's benchmarks in order, as many of them as some minutes allow.

    python -m benchmarks.suite
    python -m benchmarks.suite kernels prefill --minutes 9

The commands of a stage first run side by side, their results thrown away: all cores
compile what is measured later, one command at a time. What has its row is not measured
again, so that a suite which was stopped, or ran out of time, goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from benchmarks.rows import RESULTS

ROOT = Path(__file__).parents[1]
BASED, ATTENTION = "--models based-1.3b", "--models attn-1.3b-hd128"


@dataclass(frozen=True)
class Stage:
    """Commands (without `python -m benchmarks.`), and how many fit a GPU's memory together."""

    commands: tuple[str, ...]
    together: int


def _a_model(command: str, models: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{command} --models {model}" for model in models)


SIZES = ("based-1.3b", "based-360m", "attn-1.3b-hd128", "attn-360m", "mamba-1.3b", "mamba-360m")
STAGES = {
    "kernels": Stage(
        (
            "kernels taylor_linear_attention",
            "kernels sliding_window_attention",
            "kernels gated_short_convolution add_rms_norm swiglu rotary linear_cross_entropy",
            "kernels decayed_linear_attention selective_scan gated_norm activated_convolution",
            "kernels delta_rule gated_delta_rule generalized_delta_rule",
        ),
        5,
    ),
    "prefill": Stage(_a_model("prefill", SIZES), 6),
    "generation": Stage(
        (
            f"generation decode {BASED} based-360m --batches 1 2 4 32 128 1024",
            f"generation decode {ATTENTION} attn-1.3b-gqa --batches 1 128 --contexts 1024 4096",
            f"generation decode {BASED} --batches 1 128 1024 --contexts 1048576",
            f"generation decode {BASED} --batches 1024 4096 --contexts 8192",
            f"generation decode {ATTENTION} --batches 16 32 64 --contexts 8192",
            "generation decode --models mamba-1.3b --batches 1 128 1024",
            "generation mamba --batches 128 1024 --tokens 256",
            f"generation decode {BASED} --window 65 --batches 1 128 1024",
            f"generation decode {BASED} --deterministic --batches 128",
            f"generation decode {BASED} --recent 0 --batches 128 1024",
            f"generation decode {BASED} --quantize int8 --batches 1",
            f"generation decode {BASED} --quantize float8 --batches 1",
            f"generation generate {BASED} attn-1.3b-hd128 --batches 128 --tokens 1024",
            f"generation queue {BASED} based-360m attn-1.3b-hd128 --batches 128",
            f"generation huggingface {ATTENTION} --batches 128 --tokens 1024",
            f"generation profile {BASED} based-360m --batches 1 128 1024",
            "generation kernels --batches 1 128 1024",
            "generation state --contexts 1000 32000 1000000",
        ),
        4,
    ),
    "training": Stage(_a_model("training", (*SIZES, "hf-llama-1.3b", "hf-llama-360m")), 2),
    "scaling": Stage(("scaling",), 1),
}


@dataclass(frozen=True)
class Options:
    """Which stages, and for how long."""

    stages: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(STAGES)
    minutes: float = 600
    """In all; what runs then is stopped, with the rows that it has."""
    warm: bool = True
    """Off where everything is compiled already."""


def main(options: Options) -> None:
    """Each stage: compile together, then measure."""
    console, end = Console(), time.monotonic() + 60 * options.minutes
    for name in options.stages:
        if name not in STAGES:
            raise SystemExit(f"no stage is named {name}; there are {', '.join(STAGES)}")
        stage = STAGES[name]
        if options.warm and stage.together > 1:
            with console.status(f"{name}: compiling"), tempfile.TemporaryDirectory() as results:
                shutil.copytree(RESULTS, results, dirs_exist_ok=True)
                _together(stage, Path(results), end)
        for command in stage.commands:
            left = end - time.monotonic()
            if left <= 0:
                console.print(f"time is up before {command}; run again to go on")
                return
            console.rule(f"{command} ({left:.0f} s left)")
            process = _start(command)
            try:
                process.wait(left)
            except subprocess.TimeoutExpired:
                _stop(process)
                console.print(f"time is up in {command}; run again to go on")
                return


def _start(command: str, **options: Any) -> subprocess.Popen[Any]:
    """In a process group of its own: some benchmarks start others."""
    name, *rest = command.split()
    words = [sys.executable, "-m", f"benchmarks.{name}", *rest]
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, **options)


def _stop(process: subprocess.Popen[Any]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _together(stage: Stage, results: Path, end: float) -> None:
    """Runs the commands, some at a time; what they say or find is thrown away."""
    waiting, running = list(stage.commands), []
    aside: dict[str, Any] = {"env": {**os.environ, "BASED_RESULTS": str(results)}}
    aside |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        if time.monotonic() > end:
            for process in running:
                _stop(process)
            return
        while waiting and len(running) < stage.together:
            running.append(_start(waiting.pop(0), **aside))
        time.sleep(0.2)


if __name__ == "__main__":
    main(tyro.cli(Options))
