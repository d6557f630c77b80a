"""The tests that want a GPU, over the kernels' whole range, and a dated row of what they found.

    python -m benchmarks.gpu_tests
    python -m benchmarks.gpu_tests tests/ops

Rows are in results/gpu_tests.jsonl. Processes share the GPU: most of the time is
compilation.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import tyro
from rich.console import Console

from benchmarks.rows import add_row

ROOT = Path(__file__).parents[1]
# These run wherever they are; on a GPU they are its tests as well.
ANYWHERE = ("tests/ops/test_decode_kernels.py", "tests/ops/test_few_rows_linear.py")
PROCESSES = 14


@dataclass(frozen=True)
class Options:
    """Which tests."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ("tests",)
    processes: int = min(PROCESSES, os.cpu_count() or 1)
    timeout: int = 600
    """Seconds after which what runs is stopped."""


def main(options: Options) -> int:
    """Runs both kinds; the exit status is 1 if any test failed."""
    failed: list[str] = []
    suites = {" ".join(options.paths): [*options.paths, "-m", "gpu"], "kernels anywhere": ANYWHERE}
    for suite, arguments in suites.items():
        began = time.monotonic()
        outcomes = _run(list(arguments), options)
        row = {kind: len(names) for kind, names in outcomes.items()}
        row |= {"failures": outcomes["failed"], "wall_seconds": round(time.monotonic() - began)}
        add_row("gpu_tests", {"suite": suite}, row)
        Console().print(f"{suite}: {row}")
        failed += outcomes["failed"]
    return 1 if failed else 0


def _run(arguments: list[str], options: Options) -> dict[str, list[str]]:
    """Names of tests by outcome; what was cut off counts as failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        spread = ["-n", str(options.processes), "--dist", "worksteal", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *arguments, *spread]
        done = subprocess.run(command, cwd=ROOT, timeout=options.timeout)
        found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        if not report.exists():
            found["failed"].append(f"pytest ended with {done.returncode} and no report")
            return found
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            kinds = {child.tag for child in case}
            broken = kinds & {"failure", "error"}
            found["failed" if broken else "skipped" if "skipped" in kinds else "passed"].append(
                name
            )
    return found


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
