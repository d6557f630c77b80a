"""`based eval`: perplexity of a saved model on a split of token shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from based.errors import BasedError

if TYPE_CHECKING:
    from rich.table import Table

    from based.evaluation.perplexity import Perplexity


@dataclass(frozen=True)
class Evaluate:
    """Perplexity on recall hits (a bigram seen earlier in the context) and on the rest."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run of `based train`, or a saved model's directory."""
    data: Path
    """A data directory made by `based data`."""
    split: str = "validation"
    """Which split of it."""
    length: int = 512
    """Tokens of context a window has."""
    batch_size: int = 8
    """Windows evaluated together."""
    max_windows: int | None = None
    """Stop after this many windows."""
    device: str = "auto"
    """cpu, cuda, ...; auto is a GPU if there is one."""
    json: bool = False
    """Print one line of JSON instead of a table."""


def run(config: Evaluate) -> None:
    """Evaluates, with progress."""
    from rich.console import Console
    from rich.progress import Progress

    from based.data import TokenDataset, Windows
    from based.evaluation.perplexity import evaluate
    from based.models.checkpoint import load_model, model_folder
    from based.models.device import pick_device

    if config.batch_size < 1:
        raise BasedError(f"batch_size is {config.batch_size}; it must be at least 1")
    console = Console()
    dataset = TokenDataset(config.data, config.split)
    windows = Windows(dataset, config.length)
    model = load_model(model_folder(config.model), pick_device(config.device))
    if dataset.vocab_size > model.config.vocab_size:
        raise BasedError(
            f"the data has {dataset.vocab_size} token ids, the model {model.config.vocab_size}; "
            "pack the text with the model's own tokenizer (--tokenizer)"
        )
    total = min(windows.count, config.max_windows or windows.count)
    with Progress(console=console, transient=True, disable=config.json) as progress:
        task = progress.add_task("evaluating", total=total)
        result = evaluate(
            model,
            windows,
            config.batch_size,
            config.max_windows,
            on_windows=lambda count: progress.advance(task, count),
        )
    if config.json:
        print(json.dumps({"model": str(config.model), **result.as_dict()}))
    else:
        console.print(_table(result))


def _table(result: Perplexity) -> Table:
    from rich.table import Table

    from based.evaluation.perplexity import GROUPS

    table = Table("tokens", "share", "loss (nats)", "± s.e.", "perplexity")
    names = {"all": "all", "hits": "recall hits", "rest": "the rest"}
    for group in GROUPS:
        table.add_row(
            names[group],
            f"{result.share(group):.1%}",
            f"{result.loss(group):.4f}",
            f"{result.standard_error(group):.4f}",
            f"{result.perplexity(group):.2f}",
        )
    return table
