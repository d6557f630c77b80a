"""Draws results/generation.jsonl: tokens a second against batch and context, and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, newest, of_device, read_rows

Row = dict[str, Any]
# Rows of other choices are in the file, not in the curves.
USUAL = {"window": None, "deterministic": False, "quantize": None, "overlap": True, "fused": True}
# The context of the curves over batches, and the batch of those over contexts.
CONTEXT, BATCH = 1024, 128


def is_usual(row: Row) -> bool:
    """Whether a row of rounds was measured with the engine's defaults of its time."""
    return row["recent"] > 0 and all(row[name] == USUAL[name] for name in USUAL)


def usual_rounds(device: str | None = None) -> list[Row]:
    """Rounds of the engine as users have it, on one device, the newest of each size."""
    return newest(of_device(rounds(), device), "model", "context", "batch")


def rounds() -> list[Row]:
    """Of all devices, and every commit."""
    rows = [row for row in read_rows("generation") if row["piece"] == "decode" and is_usual(row)]
    return [row for row in rows if "tokens_per_second" in row]


def draw() -> Path:
    from matplotlib.figure import Figure

    rows = usual_rounds()
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    by_batch, by_context, memory = figure.subplots(1, 3)
    for number, model in enumerate(sorted({row["model"] for row in rows})):
        own, style = [row for row in rows if row["model"] == model], {"color": f"C{number}"}
        short = [row for row in own if row["context"] == CONTEXT]
        many = [row for row in own if row["batch"] == BATCH]
        _curve(by_batch, short, "batch", _speed, label=model, **style)
        _curve(by_batch, short, "batch", _floor, linestyle=":", **style)
        _curve(by_context, many, "context", _speed, label=model, **style)
        _curve(memory, many, "context", _gigabytes, label=model, **style)
    by_batch.set(xlabel="batch", ylabel="tokens/s", title=f"context {CONTEXT:,}; dotted: floor")
    by_context.set(xlabel="context, tokens", ylabel="tokens/s", title=f"batch {BATCH}")
    memory.set(xlabel="context, tokens", ylabel="peak memory, GB", title=f"batch {BATCH}")
    for axes in (by_batch, by_context, memory):
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.set(xscale="log", yscale="log")
            axes.legend(frameon=False, fontsize=7)
    path = RESULTS / "generation.png"
    figure.savefig(path, dpi=120)
    return path


def _speed(row: Row) -> float:
    return row["tokens_per_second"]


def _floor(row: Row) -> float:
    return 1000 * row["batch"] / row["floor_ms"]


def _gigabytes(row: Row) -> float:
    return row["peak_bytes"] / 1e9


def _curve(
    axes: Any, rows: list[Row], over: str, value: Callable[[Row], float], **style: Any
) -> None:
    line = sorted(rows, key=lambda row: row[over])
    if not line:
        return
    marker = "o" if "label" in style else ""
    axes.plot([row[over] for row in line], [value(row) for row in line], marker=marker, **style)
