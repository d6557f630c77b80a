"""A plugin of pytest that counts outcomes, and ends the run when time is up.

`pytest -p benchmarks.outcomes` writes what it counted to the file BASED_OUTCOMES when it ends,
or after BASED_MINUTES. It imports nothing of ours, which pytest's other plugins want to see first.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Outcomes:
    """The tests that were chosen, and how those that ran ended."""

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

    def pytest_unconfigure(self) -> None:
        done = len(self.passed | self.skipped | self.failed)
        row = {
            "passed": len(self.passed - self.failed),
            "skipped": len(self.skipped),
            "failed": sorted(self.failed),
            "left": self.chosen - done,
            "wall_seconds": round(time.monotonic() - self.began),
        }
        Path(os.environ["BASED_OUTCOMES"]).write_text(json.dumps(row))


def pytest_configure(config: pytest.Config) -> None:
    """Counts in the process that hands tests out, not in those that run them."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(60 * float(os.environ["BASED_MINUTES"])))
