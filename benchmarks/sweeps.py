"""The recall lab's sweeps in order, into benchmarks/results/recall, as far as some minutes allow.

    python -m benchmarks.sweeps                       # all; goes on where it stopped
    python -m benchmarks.sweeps core exact --minutes 9

`core`, `combination` and `feature-maps` are grids in TF32 with the rule for hopeless
learning rates; `exact` is six of core's points in float32 and to the end, against which
both are judged; `seeds` trains the frontier of core with two other seeds. Each writes
its rows, picture and table. What a call took is a row of sweeps.jsonl: the time of a
whole grid is the sum over its rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from based.recall.command import Plot, Sweep, run
from based.recall.results import read_rows
from benchmarks import rows

SIX = (
    *("based-d64-feature_dim16", "attention-d64", "sliding_window-d128-window64"),
    *("mamba-d64", "delta_net-d64", "rwkv7-d64"),
)
FAST = {"products": "tf32", "drop_hopeless": True}


@dataclass(frozen=True)
class Options:
    """Which sweeps, and for how long."""

    sweeps: Annotated[tuple[str, ...], tyro.conf.Positional] = (
        *("core", "exact", "seeds", "combination", "feature-maps"),
    )
    minutes: float = 600
    """In all; what runs then is put aside."""
    jobs: int | None = None
    """Points side by side; by default enough to fill the GPUs or the cores."""
    fuse: bool = False
    """Compile steps where it pays."""


def sweep_of(name: str, out: Path, options: Options) -> Sweep:
    """The sweep of that name, and where its results go."""
    common = {"jobs": options.jobs, "fuse": options.fuse}
    if name == "exact":
        return Sweep("core", out / "exact", only=SIX, **common)
    if name == "seeds":
        return Sweep("seeds", out / "core", **common)
    return Sweep(name, out / name, **FAST, **common)


def main(options: Options) -> None:
    """Each sweep, its picture, and what the call took."""
    console, end = Console(), time.monotonic() + 60 * options.minutes
    for name in options.sweeps:
        left = (end - time.monotonic()) / 60
        if left <= 0:
            console.print(f"time is up before {name}; run again to go on")
            return
        sweep = sweep_of(name, rows.RESULTS / "recall", options)
        console.rule(f"{name} ({left:.0f} minutes left)")
        began, before = time.monotonic(), len(read_rows(sweep.out / "results.jsonl"))
        try:
            run(replace(sweep, minutes=left))
        finally:
            # A call that is interrupted has taken its time too.
            found = len(read_rows(sweep.out / "results.jsonl"))
            took = {"seconds": time.monotonic() - began, "gpus": torch.cuda.device_count()}
            if found > before:
                rows.add_row("sweeps", {"sweep": name, "first": before, "last": found}, took)
        if found > before:
            run(Plot(sweep.out))


if __name__ == "__main__":
    main(tyro.cli(Options))
