"""The demo's picture: learning, recall, memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from based.training.metrics import smoothed

if TYPE_CHECKING:
    from examples.demo import Contestant

COLORS = ("#c0392b", "#2c3e50", "#7f8c8d")


def draw(models: list[Contestant], path: Path) -> None:
    """Writes a PNG of four panels."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    panels = figure.subplots(2, 2)
    _losses(panels[0, 0], models)
    _perplexities(panels[0, 1], models)
    _recall(panels[1, 0], models)
    _costs(panels[1, 1], models[:2])
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _losses(axes: Axes, models: list[Contestant]) -> None:
    for one, color in zip(models, COLORS, strict=True):
        axes.plot(smoothed(one.losses or []), color=color, label=one.name)
    axes.set(title="training loss (smoothed)", xlabel="step of 1,024 tokens", ylabel="nats a token")
    axes.legend(frameon=False)


def _perplexities(axes: Axes, models: list[Contestant]) -> None:
    groups = {"all": "all", "hits": "recall hits", "rest": "the rest"}
    for i, (one, color) in enumerate(zip(models, COLORS, strict=True)):
        assert one.perplexity is not None
        values = [one.perplexity.perplexity(group) for group in groups]
        places = [x + 0.27 * (i - 1) for x in range(len(groups))]
        bars = axes.bar(places, values, width=0.25, color=color, label=one.name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(groups)), list(groups.values()))
    axes.set(title="perplexity on held-out text (lower is better)", yscale="log")
    axes.legend(frameon=False)


def _recall(axes: Axes, models: list[Contestant]) -> None:
    for one, color in zip(models, COLORS, strict=True):
        assert one.probe is not None
        size, accuracy = one.probe.state_bytes / 1000, 100 * one.probe.accuracy
        axes.plot(size, accuracy, "o", markersize=11, color=color)
        axes.annotate(
            f"{one.name}, {accuracy:.0f} %",
            (size, accuracy),
            textcoords="offset points",
            # Beside each other at the top: one name to the left, one to the right.
            xytext=(-8, -20) if one is models[0] else (0, -20),
            ha="right" if one is models[0] else "center",
        )
    axes.set(xscale="log", xlim=(4, 400), ylim=(0, 112))
    axes.set(title="associative recall", xlabel="state of a sequence, kB", ylabel="recalled, %")


def _costs(axes: Axes, models: list[Contestant]) -> None:
    time = axes.twinx()
    for one, color in zip(models, COLORS[:2], strict=True):
        contexts = list(one.costs or {})
        costs = list((one.costs or {}).values())
        axes.plot(contexts, [size / 1e6 for size, _ in costs], "o-", color=color, label=one.name)
        time.plot(contexts, [ms for _, ms in costs], "s:", color=color)
    axes.set(xscale="log", yscale="log", title="generation: memory (solid) and time (dotted)")
    axes.set(xlabel="tokens of context", ylabel="state of a sequence, MB")
    time.set(yscale="log", ylabel="ms a token")
    time.spines[["top"]].set_visible(False)
    axes.legend(frameon=False)
