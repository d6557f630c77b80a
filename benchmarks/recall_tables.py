"""The recall lab's tables in docs/recall.md, from the rows of its sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from based.recall.results import Row, agreement, best_rows, configuration, read_rows
from benchmarks.rows import RESULTS

# Feature maps in the order of the table; Taylor's is the architecture itself.
NAMES = {
    "relu": "ReLU",
    "all_poly": "all_poly",
    "pos_elu": "PosELU",
    "cosformer": "CosFormer",
    "square": "square",
    "performer": "Performer",
    "identity": "identity",
}


def arithmetic() -> list[list[str]]:
    """Points in float32 and to the end beside the sweep's, and what its choice of rate loses."""
    lines = [["point", "float32", "the sweep", "differ", "the sweep's rate loses"]]
    for row, other, loss in agreement(_rows("exact"), _rows("core")):
        numbers = (row["accuracy"], other["accuracy"], abs(row["accuracy"] - other["accuracy"]))
        lines.append([configuration(row), *(f"{number:.3f}" for number in (*numbers, loss))])
    return lines


def combination() -> list[list[str]]:
    """Convolution, Taylor and window together and alone, by budget."""
    kinds = ("shipped", "shipped_taylor", "shipped_window")
    best = [row for row in best_rows(_rows("combination")) if row["architecture"] in kinds]
    budgets = sorted(row["state_bytes"] for row in best if row["architecture"] == "shipped")
    lines = [["state", "together", "Taylor alone", "window alone"]]
    for budget in budgets:
        near = {
            row["architecture"]: row["accuracy"]
            for row in best
            if abs(row["state_bytes"] - budget) <= 0.1 * budget
        }
        lines.append([_size(budget), *(_shown(near.get(kind)) for kind in kinds)])
    return lines


def feature_maps() -> list[list[str]]:
    """Accuracy and state by feature map and width."""
    best = best_rows(_rows("feature-maps"))
    widths = sorted({row["hidden_size"] for row in best})
    dims = sorted({row["dials"]["feature_dim"] for row in best if row["architecture"] == "based"})
    taylor = {
        f"Taylor, feature_dim {dim}": [
            row
            for row in best
            if row["architecture"] == "based" and row["dials"]["feature_dim"] == dim
        ]
        for dim in dims
    }
    others = {
        shown: [row for row in best if row["architecture"] == name] for name, shown in NAMES.items()
    }
    lines = [["feature map", *(f"d {width}" for width in widths)]]
    for shown, own in (taylor | others).items():
        by_width = {row["hidden_size"]: row for row in own}
        lines.append([shown, *(_with_size(by_width.get(width)) for width in widths)])
    return lines


def _rows(sweep: str) -> Sequence[Row]:
    return read_rows(Path(RESULTS) / "recall" / sweep / "results.jsonl")


def _with_size(row: Row | None) -> str:
    return "" if row is None else f"{row['accuracy']:.3f} ({_size(row['state_bytes'])})"


def _shown(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.3f}"


def _size(size: int) -> str:
    return f"{size / 1000:.0f} KB"
