"""What eight-bit weights cost in perplexity, on a model and text of yours.

    python -m benchmarks.quantization demo-output/based-tiny --data demo-output/data

The same windows with the weights as saved, in int8 and in float8; the difference in nats a
token is paired by window. Rows are in results/quantization.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from based.data import TokenDataset, Windows
from based.evaluation.perplexity import GROUPS, Perplexity, evaluate, paired_difference
from based.generation.quantization import Precision, quantize_weights
from based.models.checkpoint import load_model, model_folder
from based.models.device import pick_device
from benchmarks.rows import write_rows

PRECISIONS: tuple[Precision, ...] = ("int8", "float8")


@dataclass(frozen=True)
class Options:
    """Which model, on which text."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run of `based train`, or a saved model's directory."""
    data: Path
    """A data directory made by `based data`; its validation split is read."""
    length: int = 512
    """Tokens of context a window has."""
    max_windows: int | None = None
    """Stop after this many windows."""
    device: str = "auto"


def main(options: Options) -> None:
    """Measures, shows and writes."""
    plain = measured(options, None)
    rows = [_row(options, "as saved", plain, plain)]
    for precision in PRECISIONS:
        rows.append(_row(options, precision, measured(options, precision), plain))
    table = Table("weights", *GROUPS, "more nats a token", title="perplexity")
    for row in rows:
        shown = (f"{row[f'perplexity_{group}']:.3f}" for group in GROUPS)
        table.add_row(row["weights"], *shown, f"{row['difference']:+.5f} ± {row['error']:.5f}")
    Console().print(table)
    write_rows("quantization", rows)


def measured(options: Options, precision: Precision | None) -> Perplexity:
    """Perplexity with the weights in that precision."""
    windows = Windows(TokenDataset(options.data, "validation"), options.length)
    model = load_model(model_folder(options.model), pick_device(options.device))
    if precision is not None:
        quantize_weights(model.blocks, precision)
    return evaluate(model, windows, max_windows=options.max_windows)


def _row(options: Options, weights: str, found: Perplexity, plain: Perplexity) -> dict[str, Any]:
    difference = paired_difference(found, plain)
    return {
        "model": options.model.name,
        "weights": weights,
        "tokens": int(found.tokens.sum()),
        **{f"perplexity_{group}": found.perplexity(group) for group in GROUPS},
        "difference": difference.mean,
        "error": difference.standard_error,
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
