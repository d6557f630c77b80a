"""Results as JSON lines, each row with the device, versions and commit it was measured with.

BASED_RESULTS is another directory for them, BASED_COMMIT the commit where git is not.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from based import __version__

RESULTS = Path(os.environ.get("BASED_RESULTS", Path(__file__).parent / "results"))


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return f"{cpu}, {torch.get_num_threads()} threads"


def provenance() -> dict[str, str]:
    """What every row carries."""
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "based": __version__,
        "commit": os.environ.get("BASED_COMMIT") or _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    here = Path(__file__).parent
    found = subprocess.run(git, capture_output=True, text=True, check=False, cwd=here)
    return found.stdout.strip() or "unknown"


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes NAME.jsonl; rows of other devices that are there already are kept."""
    path, common = RESULTS / f"{name}.jsonl", provenance()
    kept = [row for row in read_rows(name) if row["device"] != common["device"]]
    lines = [json.dumps(row) for row in [*kept, *({**row, **common} for row in rows)]]
    path.write_text("\n".join(lines) + "\n")
    return path


def add_row(name: str, key: dict[str, Any], values: dict[str, Any]) -> None:
    """Adds one row to NAME.jsonl at once, in the place of one with the same key and device."""
    row = {**key, **values, **provenance()}
    kept = [
        other for other in read_rows(name) if not _same(other, {**key, "device": row["device"]})
    ]
    (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*kept, row]))


def has_row(name: str, key: dict[str, Any]) -> bool:
    """Whether this device has measured that already, at this commit."""
    common = provenance()
    wanted = {**key, "device": common["device"], "commit": common["commit"]}
    return any(_same(row, wanted) for row in read_rows(name))


def _same(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def read_rows(name: str) -> list[dict[str, Any]]:
    """All rows of NAME.jsonl; none if there is no such file."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def device_rows(name: str, device: str | None = None) -> list[dict[str, Any]]:
    """Rows of NAME.jsonl of one device; by default of the last row's, so the newest."""
    return of_device(read_rows(name), device)


def of_device(rows: list[dict[str, Any]], device: str | None = None) -> list[dict[str, Any]]:
    """Those of one device; by default of the last row's."""
    wanted = device or (rows[-1]["device"] if rows else None)
    return [row for row in rows if row["device"] == wanted]


def newest(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Of rows that agree in these fields, the one that was written last."""
    found = {tuple(row.get(name) for name in names): row for row in rows}
    return list(found.values())


def median_seconds(function: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
    """Median wall-clock seconds of a call on the CPU."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
