"""The tests that want a GPU, over the kernels' whole range, and a dated row of what they found.

    python -m benchmarks.gpu_tests
    python -m benchmarks.gpu_tests tests/ops --minutes 5

Rows are in results/gpu_tests.jsonl: what failed by name, and how many tests were left when
time was up. Processes share the GPU: most of the time is compilation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import tyro
from rich.console import Console

from benchmarks.rows import add_row

ROOT = Path(__file__).parents[1]
# Where pytest finds `benchmarks.outcomes`.
PLUGIN = str(ROOT)
# These run wherever they are; on a GPU they are its tests as well.
ANYWHERE = (
    "tests/ops/test_decode_kernels.py",
    "tests/ops/test_few_rows_linear.py",
    "tests/ops/test_few_rows_hopper.py",
)


@dataclass(frozen=True)
class Options:
    """Which tests."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ("tests",)
    processes: int = min(14, os.cpu_count() or 1)
    minutes: float = 60
    """Of each of the two runs: those marked gpu, and those that run anywhere."""


def run(arguments: list[str], options: Options) -> dict[str, object]:
    """What pytest found, in a process of its own, as it is where people run it."""
    with TemporaryDirectory() as folder:
        found = Path(folder, "outcomes.json")
        environment = {
            **os.environ,
            "BASED_OUTCOMES": str(found),
            "BASED_MINUTES": str(options.minutes),
            "PYTHONPATH": os.pathsep.join((PLUGIN, os.environ.get("PYTHONPATH", ""))),
        }
        spread = ["-n", str(options.processes), "--dist", "worksteal"]
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.outcomes", *spread]
        subprocess.run([*command, *arguments], cwd=ROOT, env=environment, check=False)
        if not found.exists():
            raise SystemExit("error: pytest ended before it ran a test; see above")
        return json.loads(found.read_text())


def main(options: Options) -> int:
    """Runs both kinds; the exit status is 1 unless every test passed."""
    whole = True
    suites = {" ".join(options.paths): [*options.paths, "-m", "gpu"], "anywhere": [*ANYWHERE]}
    for suite, arguments in suites.items():
        row = run(arguments, options)
        add_row("gpu_tests", {"suite": suite}, row)
        Console().print(f"{suite}: {row}")
        whole &= bool(row["passed"]) and not row["failed"] and not row["left"]
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
