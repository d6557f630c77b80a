"""Metrics of a run: JSON lines, and a picture of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from based.files import not_saved


class MetricsLog:
    """Appends rows to `metrics.jsonl`; after a kill, drops rows that will be written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **row: Any) -> None:
        """Writes one row at once."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise not_saved(self.path, error) from error

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows."""
        return read_metrics(self.path)

    def keep_until(self, step: int) -> None:
        """Drops rows after `step`, and a line that a kill cut short."""
        if not self.path.exists():
            return
        kept = "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(kept)
        os.replace(temporary, self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def plot_metrics(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training loss, smoothed too, and held-out loss over tokens."""
    from matplotlib.figure import Figure

    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "loss_all" in row]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    tokens, losses = [row["tokens"] for row in steps], [row["loss"] for row in steps]
    axes.plot(tokens, losses, color="0.8", linewidth=0.8, label="training, each step")
    axes.plot(tokens, smoothed(losses), color="C0", label="training, smoothed")
    for group, color, label in (
        ("all", "C3", "held out"),
        ("hits", "C2", "held out, recall hits"),
        ("rest", "C1", "held out, the rest"),
    ):
        values = [row[f"loss_{group}"] for row in held_out]
        axes.plot([row["tokens"] for row in held_out], values, "o-", color=color, label=label)
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=title)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def smoothed(values: list[float], decay: float = 0.97) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight)
    return out
