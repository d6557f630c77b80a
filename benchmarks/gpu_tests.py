"""The tests that want a GPU, over the kernels' whole range, and a dated row of what they found.

    python -m benchmarks.gpu_tests
    python -m benchmarks.gpu_tests tests/ops --minutes 5

Rows are in results/gpu_tests.jsonl: what failed by name, and how many tests were left when
time was up. Processes share the GPU: most of the time is compilation.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from rich.console import Console

from benchmarks.rows import add_row

ROOT = Path(__file__).parents[1]
# These run wherever they are; on a GPU they are its tests as well.
ANYWHERE = ("tests/ops/test_decode_kernels.py", "tests/ops/test_few_rows_linear.py")


@dataclass(frozen=True)
class Options:
    """Which tests."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ("tests",)
    processes: int = min(14, os.cpu_count() or 1)
    minutes: float = 60
    """Of each of the two runs: those marked gpu, and those that run anywhere."""


@dataclass
class Outcomes:
    """A pytest plugin that counts, and ends the run when time is up."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    chosen: int = 0
    passed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.chosen = len(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped:
            self.skipped.add(report.nodeid)
        elif report.when == "call":
            self.passed.add(report.nodeid)
        if time.monotonic() - self.began > self.seconds:
            pytest.exit("time is up")

    def row(self) -> dict[str, object]:
        """What the run found."""
        done = len(self.passed | self.skipped | self.failed)
        return {
            "passed": len(self.passed - self.failed),
            "skipped": len(self.skipped),
            "failed": sorted(self.failed),
            "left": self.chosen - done,
            "wall_seconds": round(time.monotonic() - self.began),
        }


def main(options: Options) -> int:
    """Runs both kinds; the exit status is 1 unless every test passed."""
    os.chdir(ROOT)
    whole = True
    suites = {" ".join(options.paths): [*options.paths, "-m", "gpu"], "anywhere": [*ANYWHERE]}
    for suite, arguments in suites.items():
        outcomes = Outcomes(60 * options.minutes)
        spread = ["-n", str(options.processes), "--dist", "worksteal"]
        pytest.main([*arguments, *spread], plugins=[outcomes])
        row = outcomes.row()
        add_row("gpu_tests", {"suite": suite}, row)
        Console().print(f"{suite}: {row}")
        whole &= bool(outcomes.passed) and not outcomes.failed and not row["left"]
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
