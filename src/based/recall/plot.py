"""The frontier as a picture and as a table: accuracy against bytes of state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from based.recall.results import Row, by_configuration, configuration, frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED = Path(__file__).parent / "published.json"
COLORS = {
    "based": "#1f6fb4",
    "attention": "#222222",
    "sliding_window": "#e08214",
    "mamba": "#2ca25f",
    "mamba2": "#7fbf3f",
    "h3": "#b2abd2",
    "hyena": "#998ec3",
    "gla": "#d6604d",
    "delta_net": "#c51b7d",
    "gated_delta_net": "#8e0152",
    "rwkv5": "#bf812d",
    "rwkv7": "#8c510a",
    "shipped": "#08306b",
    "shipped_taylor": "#4292c6",
    "shipped_window": "#f5b14c",
    "identity": "#737373",
    "relu": "#e7298a",
    "pos_elu": "#66a61e",
    "square": "#e6ab02",
    "cosformer": "#7570b3",
    "performer": "#1b9e77",
    "all_poly": "#a6761d",
}


def published(figure: str = "zoology") -> dict[str, list[tuple[int, float]]]:
    """Digitised points by architecture: bytes by the paper's accounting, accuracy."""
    points = json.loads(PUBLISHED.read_text())[figure]["points"]
    return {name: [(size, accuracy) for size, accuracy in own] for name, own in points.items()}


def draw(rows: Sequence[Row], path: Path, beside_published: bool = True) -> list[Path]:
    """PNG and SVG beside each other: true bytes left, the paper's accounting right.

    The published points stand faint behind ours, on the right alone: they have no
    true bytes. Results of another task than the paper's have no right half.
    """
    from matplotlib.figure import Figure

    counted = [row for row in rows if beside_published and row.get("paper_bytes") is not None]
    figure = Figure(figsize=(14, 5.6) if counted else (8, 5.2), layout="constrained")
    axes = figure.subplots(1, 2 if counted else 1, sharey=True, squeeze=False)[0]
    _scatter(axes[0], rows, "state_bytes")
    edge = [line for line in table(rows) if line["on_frontier"]]
    axes[0].step(
        [line["state_bytes"] for line in edge],
        [line["accuracy"] for line in edge],
        where="post",
        color="0.75",
        zorder=0,
    )
    axes[0].set(title="what a state occupies; line: the frontier", ylabel="MQAR accuracy")
    if counted:
        _published(axes[1], {row["architecture"] for row in counted})
        _scatter(axes[1], counted, "paper_bytes")
        axes[1].set(title="the paper's accounting; faint: published")
    for one in axes:
        one.set_xscale("log", base=2)
        one.xaxis.set_major_formatter(lambda size, _: _bytes(size))
        one.set(xlabel="state of one sequence, float32", ylim=(-0.02, 1.03))
        one.grid(alpha=0.25)
    figure.legend(*_legend(axes[0]), frameon=False, loc="outside right upper")
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for one in paths:
        figure.savefig(one, dpi=150)
    return paths


def _bytes(size: float) -> str:
    """A power of two by its unit."""
    power = min(max(int(size).bit_length() - 1, 0) // 10, 2)
    return f"{size / 1024**power:g} {('B', 'KiB', 'MiB')[power]}"


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    """Markers without their bars."""
    bars: list[Any]
    bars, labels = axes.get_legend_handles_labels()
    return [markers for markers, *_ in bars], labels


def _scatter(axes: Axes, rows: Sequence[Row], size: str) -> None:
    """One colour an architecture; a bar spans the seeds of a configuration."""
    groups = by_configuration(rows)
    for architecture in sorted({group[0]["architecture"] for group in groups}):
        own = [group for group in groups if group[0]["architecture"] == architecture]
        values = [[row["accuracy"] for row in group] for group in own]
        means = [sum(value) / len(value) for value in values]
        low = [mean - min(value) for mean, value in zip(means, values, strict=True)]
        high = [max(value) - mean for mean, value in zip(means, values, strict=True)]
        axes.errorbar(
            [group[0][size] for group in own],
            means,
            yerr=[low, high],
            fmt="o",
            color=_color(architecture),
            label=architecture.replace("_", " "),
            markersize=6,
            capsize=2,
        )


def _published(axes: Axes, architectures: set[str]) -> None:
    for architecture, points in published().items():
        if architecture in architectures:
            sizes, accuracies = zip(*points, strict=True)
            color = _color(architecture)
            axes.plot(sizes, accuracies, "D", color=color, alpha=0.28, markersize=8, zorder=0)


def _color(architecture: str) -> str:
    return COLORS.get(architecture, "#000000")


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each configuration, by true bytes: the figure in numbers.

    `accuracy` is the mean over seeds, each at its best learning rate; `published`
    is the digitised point of the same architecture within 5 % of its paper bytes.
    """
    lines = []
    for group in by_configuration(rows):
        first, accuracies = group[0], [row["accuracy"] for row in group]
        lines.append(
            {
                "configuration": configuration(first),
                "state_bytes": first["state_bytes"],
                "paper_bytes": first["paper_bytes"],
                "accuracy": sum(accuracies) / len(accuracies),
                "range": (min(accuracies), max(accuracies)),
                "seeds": len(group),
                "published": _published_near(first["architecture"], first["paper_bytes"]),
                "learning_rate": first["learning_rate"],
                "epochs": first["epochs"],
                "on_frontier": False,
            }
        )
    lines.sort(key=lambda line: (line["state_bytes"], -line["accuracy"]))
    for line in frontier(lines):
        line["on_frontier"] = True
    return lines


def _published_near(architecture: str, size: int | None) -> float | None:
    points = published().get(architecture, [])
    if size is None or not points:
        return None
    nearest = min(points, key=lambda point: abs(point[0] - size))
    return nearest[1] if abs(nearest[0] - size) < 0.05 * size else None


def markdown(rows: Sequence[Row], beside_published: bool = True) -> str:
    """The table as Markdown, frontier points in bold."""
    head = (
        "| configuration | state, bytes | accuracy (range) | seeds | published | "
        "learning rate | epochs |\n|---|---:|---|---:|---:|---:|---:|\n"
    )
    lines = []
    for line in table(rows):
        low, high = line["range"]
        accuracy = f"{line['accuracy']:.3f}" + (
            f" ({low:.3f} to {high:.3f})" if line["seeds"] > 1 else ""
        )
        name = f"**{line['configuration']}**" if line["on_frontier"] else line["configuration"]
        known = line["published"] is not None and beside_published
        found = f"{line['published']:.3f}" if known else ""
        lines.append(
            f"| {name} | {line['state_bytes']:,} | {accuracy} | {line['seeds']} | {found} | "
            f"{line['learning_rate']:.2g} | {line['epochs']} |"
        )
    return head + "\n".join(lines) + "\n"
