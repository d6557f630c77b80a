"""Tokens a second of models over a length, on one device: what training and prefill share."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from based.training.hardware import peak_memory
from benchmarks import pieces
from benchmarks.pieces import Row
from benchmarks.profile import profiled

Step = Callable[[], object]


def missing(out: Path, name: str, model: str, lengths: Sequence[int]) -> list[int]:
    """Lengths at which this device has no row of the model yet."""
    done = {(row["model"], row["length"]) for row in pieces.read(out, name)}
    return [length for length in lengths if (model, length) not in done]


def release(device: torch.device) -> None:
    """Frees what the length before left behind, cycles and all."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(build: Callable[[], Step], tokens: int, repeats: int, device: torch.device) -> Row:
    """Median of several steps of `tokens`, after two; on a GPU their time by kind too.

    What is built is built in the time that warming up takes.
    """
    began = time.perf_counter()
    step = build()
    for _ in range(2):
        step()
    synchronise(device)
    warmup = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [_seconds(step, device) for _ in range(repeats)]
    return {
        "tokens_per_second": tokens / statistics.median(times),
        "slowest": tokens / max(times),
        "fastest": tokens / min(times),
        "milliseconds": 1e3 * statistics.median(times),
        "warmup_seconds": warmup,
        "memory_bytes": peak_memory(device),
        "by_kind": profiled(step) if device.type == "cuda" else None,
    }


def _seconds(step: Step, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; nothing else needs it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_order(rows: list[Row], models: Sequence[str]) -> list[Row]:
    """Sorted by model as `models` is, others last, then by length."""
    order = {model: number for number, model in enumerate(models)}
    return sorted(rows, key=lambda row: (order.get(row["model"], 99), row["length"]))


def show_kinds(console: Console, rows: list[Row]) -> None:
    """Where the time of each row goes, as shares."""
    for row in rows:
        if row["by_kind"]:
            total = row["milliseconds"]
            parts = {**row["by_kind"], "idle": max(total - sum(row["by_kind"].values()), 0.0)}
            text = ", ".join(f"{kind} {ms / total:.0%}" for kind, ms in parts.items())
            console.print(f"{row['model']} at {row['length']:,}: {text}")


def plot(
    rows: list[Row], path: Path, xlabel: str, limit: Callable[[Row], float] | None = None
) -> None:
    """Tokens a second over length, a panel a size; dotted: the `limit` of Based's rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, size in zip(figure.subplots(1, 2), ("360m", "1.3b"), strict=True):
        for model in sorted({row["model"] for row in rows if size in row["model"]}):
            part = in_order([row for row in rows if row["model"] == model], (model,))
            lengths = [row["length"] for row in part]
            speeds = [row["tokens_per_second"] for row in part]
            (line,) = axes.plot(lengths, speeds, "o-", label=model)
            if limit is not None and model.startswith("based"):
                axes.plot(lengths, [limit(row) for row in part], ":", color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set(xlabel=xlabel, ylabel="tokens a second", title=size)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
