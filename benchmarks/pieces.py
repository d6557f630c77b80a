"""Benchmarks in pieces: each row on the disk at once, a process a model, and stopped goes on.

Rows are in OUT/NAME.jsonl; a piece that this device has a row of is not measured again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.rows import provenance

Row = dict[str, Any]


def read(out: Path, name: str) -> list[Row]:
    """This device's rows."""
    path, device = out / f"{name}.jsonl", provenance()["device"]
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["device"] == device]


def write(out: Path, name: str, row: Row) -> None:
    """Appends a row, with where and when it was measured."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({**row, **provenance()}) + "\n")


def arguments(options: Any, **changed: Any) -> list[str]:
    """The command line that stands for options, some of them changed."""
    flags: list[str] = []
    for name, value in {**vars(options), **changed}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{flag}", *map(str, values)]
    return flags


def each_in_a_process(name: str, options: Any, models: Sequence[str], console: Console) -> None:
    """Runs `benchmarks.NAME` for one model after the other; none begins when time is up."""
    began = time.monotonic()
    for model in models:
        left = options.seconds - (time.monotonic() - began)
        if left <= 0:
            console.print(f"{model}: not begun after {options.seconds:.0f} s; run again to go on")
            continue
        flags = arguments(options, models=(model,), worker=True, seconds=left)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=False)
