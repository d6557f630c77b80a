"""Results as JSON lines that survive a kill, and what is read from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from based.errors import BasedError
from based.recall.config import Point, Recipe

Row = dict[str, Any]


class Results:
    """The directory of a sweep: results.jsonl, recipe.json, and checkpoints of running points."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self.path = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        description = folder / "recipe.json"
        values = {**recipe.to_dict(), "key": recipe.key}
        if not description.exists():
            description.write_text(json.dumps(values, indent=2) + "\n")
        elif json.loads(description.read_text())["key"] != recipe.key:
            raise BasedError(
                f"{folder} holds results of another recipe ({description}); "
                "choose another directory, or the options that it was begun with"
            )
        self._cut_torn_line()

    def rows(self) -> list[Row]:
        """All rows, in the order they were written."""
        return read_rows(self.path)

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows, on the disk before it returns."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def missing(self, point: Point, learning_rates: Sequence[float]) -> tuple[float, ...]:
        """Learning rates of a point without a result; failed ones are tried again."""
        found = {
            row["learning_rate"]
            for row in self.rows()
            if row["point"] == point.key and row["status"] != "failed"
        }
        return tuple(rate for rate in learning_rates if rate not in found)

    def checkpoint(self, point: Point) -> Path:
        """Where a running point is put aside."""
        return self.folder / "running" / point.key

    def _cut_torn_line(self) -> None:
        """A kill while a row was written leaves half a line: it counts as not written."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """For each point and seed the row of its best learning rate, failed ones left out."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["status"] in ("failed", "impossible"):
            continue
        if row["point"] not in best or row["accuracy"] > best[row["point"]]["accuracy"]:
            best[row["point"]] = row
    return list(best.values())


def frontier(rows: Iterable[Row]) -> list[Row]:
    """Rows that none beats in accuracy at as many true bytes or fewer, by bytes."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["state_bytes"], -row["accuracy"])):
        if not kept or row["accuracy"] > kept[-1]["accuracy"]:
            kept.append(row)
    return kept


class Agreement(NamedTuple):
    """A point's best rows in two sweeps, and what the other's learning rate loses in the first."""

    row: Row
    other: Row
    loss: float


def agreement(rows: Sequence[Row], others: Iterable[Row]) -> list[Agreement]:
    """How the points that two sweeps share came out, by name."""
    ours, theirs = ({row["point"]: row for row in best_rows(some)} for some in (rows, others))
    reached = {(row["point"], row["learning_rate"]): row.get("accuracy", 0.0) for row in rows}
    pairs = [(ours[name], theirs[name]) for name in sorted(ours.keys() & theirs.keys())]
    return [
        Agreement(
            row, other, row["accuracy"] - reached.get((row["point"], other["learning_rate"]), 0.0)
        )
        for row, other in pairs
    ]


def by_configuration(rows: Iterable[Row]) -> list[list[Row]]:
    """Best rows grouped over seeds: one group an architecture, width and dials."""
    groups: dict[str, list[Row]] = {}
    for row in best_rows(rows):
        groups.setdefault(configuration(row), []).append(row)
    return list(groups.values())


def configuration(row: Row) -> str:
    """A name of the point without its seed."""
    dials = ", ".join(f"{name} {value}" for name, value in sorted(row["dials"].items()))
    return f"{row['architecture']}, d {row['hidden_size']}" + (f", {dials}" if dials else "")
