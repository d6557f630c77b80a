"""The recall lab's tables in docs/recall.md, from the rows of its sweeps."""

from __future__ import annotations

from based.recall.grids import CLOSE
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
    best = best_rows(_rows("combination"))
    budgets = sorted(row["state_bytes"] for row in best if row["architecture"] == "shipped")
    lines = [["state", "together", "Taylor alone", "window alone"]]
    for budget in budgets:
        near = {
            row["architecture"]: f"{row['accuracy']:.3f}"
            for row in best
            if abs(row["state_bytes"] - budget) <= CLOSE * budget
        }
        lines.append([_size(budget), *(near.get(kind, "") for kind in kinds)])
    return lines


def feature_maps() -> list[list[str]]:
    """Accuracy and state by feature map and width."""
    best = best_rows(_rows("feature-maps"))
    cells = {
        (_feature_map(row), row["hidden_size"]): (
            f"{row['accuracy']:.3f} ({_size(row['state_bytes'])})"
        )
        for row in best
    }
    widths = sorted({row["hidden_size"] for row in best})
    taylor = sorted({name for name, _ in cells if name not in NAMES.values()})
    lines = [["feature map", *(f"d {width}" for width in widths)]]
    for name in (*taylor, *NAMES.values()):
        lines.append([name, *(cells.get((name, width), "") for width in widths)])
    return lines


def _feature_map(row: Row) -> str:
    if row["architecture"] == "based":
        return f"Taylor, feature_dim {row['dials']['feature_dim']}"
    return NAMES[row["architecture"]]


def _rows(sweep: str) -> list[Row]:
    return read_rows(RESULTS / "recall" / sweep / "results.jsonl")


def _size(size: int) -> str:
    return f"{size / 1000:.0f} KB"
