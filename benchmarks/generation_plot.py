"""Draws results/generation.jsonl: tokens a second, and memory, against batch and context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, read_rows

# Rows of other choices are in the file, not in the curves.
USUAL = {"window": None, "recent": 16, "deterministic": False, "quantize": None}
USUAL |= {"overlap": True, "fused": True}


def is_usual(row: dict[str, Any]) -> bool:
    """Whether a row of rounds was measured with the engine's defaults."""
    return all(row[name] == USUAL[name] for name in USUAL)


def draw() -> Path:
    from matplotlib.figure import Figure

    rows = [row for row in read_rows("generation") if "tokens_per_second" in row]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    by_batch, by_context, memory = figure.subplots(1, 3)
    decoded = [row for row in rows if row["piece"] == "decode" and is_usual(row)]
    for (name, context), line in _lines(decoded, "model", "context").items():
        _curve(by_batch, line, "batch", f"{name}, {context:,}")
    for (name, batch), line in _lines(decoded, "model", "batch").items():
        if len(line) < 2:
            continue  # one context says nothing about the others
        _curve(by_context, line, "context", f"{name}, batch {batch}")
    for (name, context), line in _lines(decoded, "model", "context").items():
        line.sort(key=lambda row: row["batch"])
        gigabytes = [row["peak_bytes"] / 1e9 for row in line]
        memory.loglog([row["batch"] for row in line], gigabytes, "o-", label=f"{name}, {context:,}")
    by_batch.set(xlabel="batch", ylabel="tokens/s (dotted: floor)", title="against batch")
    by_context.set(xlabel="context, tokens", ylabel="tokens/s", title="against context")
    memory.set(xlabel="batch", ylabel="peak memory, GB", title="memory")
    for axes in (by_batch, by_context, memory):
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    path = RESULTS / "generation.png"
    figure.savefig(path, dpi=120)
    return path


def _lines(rows: list[dict[str, Any]], *names: str) -> dict[tuple, list[dict[str, Any]]]:
    lines: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in names), []).append(row)
    return lines


def _curve(axes: Any, line: list[dict[str, Any]], over: str, label: str) -> None:
    line.sort(key=lambda row: row[over])
    where = [row[over] for row in line]
    (drawn,) = axes.loglog(where, [row["tokens_per_second"] for row in line], "o-", label=label)
    floors = [1000 * row["batch"] / row["floor_ms"] for row in line]
    axes.loglog(where, floors, ":", color=drawn.get_color())
