"""`based data`: from text files to token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from based.errors import BasedError

if TYPE_CHECKING:
    from based.data.hub import HubDataset


@dataclass(frozen=True)
class Data:
    """Train a byte-level BPE tokenizer on text files and pack them into token shards.

    A .jsonl file holds one document a line, in its field "text"; any other file is
    one document. Files may be compressed (.gz, .xz, .bz2). A Hugging Face dataset
    can be read instead. Without either, the corpus that ships with Based is packed:
    the State of the Union addresses.
    """

    out: Annotated[Path, tyro.conf.Positional]
    """The data directory to write, e.g. data/mine."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Text files, and directories of them."""
    dataset: str | None = None
    """Instead of files: a Hugging Face dataset's name, or a directory of one."""
    subset: str | None = None
    """The dataset's configuration, where it has several."""
    split: str = "train"
    """The dataset's split to read; what is held out is drawn from it."""
    field: str = "text"
    """The dataset's column with the text."""
    download: bool = False
    """Fetch the whole dataset first, instead of streaming it."""
    processes: int = 1
    """Processes that tokenize, each on a core; one process uses all cores, but less well."""
    vocab_size: int = 2048
    """Tokens of the new vocabulary; 2048 suits a few megabytes, 50257 a few gigabytes."""
    tokenizer: Path | None = None
    """Use this tokenizer.json instead of training one."""
    validation_fraction: float = 0.05
    """Share of the text that is held out of training."""
    seed: int = 0
    """Decides which documents are held out."""


def run(config: Data) -> None:
    """Packs the files, with progress."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from based.data.prepare import prepare
    from based.data.tokenizer import Tokenizer

    console = Console()
    source, total = _source(config)
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {
            "tokenizer": progress.add_task("training the tokenizer", total=total, visible=False),
            "tokens": progress.add_task("packing tokens", total=total, visible=False),
        }

        def on_bytes(stage: str, count: int) -> None:
            progress.update(tasks[stage], advance=count, visible=True)

        packed = prepare(
            source,
            config.out,
            config.vocab_size,
            tokenizer=tokenizer,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
            processes=config.processes,
            on_bytes=on_bytes,
        )
    console.print(f"{packed.documents} documents, vocabulary {packed.vocab_size}")
    for split, tokens in packed.tokens.items():
        size = packed.text_bytes[split]
        console.print(f"{split:>10}: {tokens:,} tokens of {size / max(tokens, 1):.2f} bytes")
    console.print(f"next: based train RUN --data {config.out}")


def _source(config: Data) -> tuple[list[Path] | HubDataset, int | None]:
    """What to read, and its bytes of text where they are known before."""
    from based.data.documents import CORPUS, OPENERS, find_files
    from based.data.hub import HubDataset

    if config.dataset is not None:
        if config.files:
            raise BasedError("give files or --dataset, not both")
        options = (config.subset, config.split, config.field, not config.download)
        return HubDataset(config.dataset, *options), None
    paths = list(config.files) or [CORPUS]
    files = find_files(paths)
    # Text is counted as it is read; of compressed files the total is not known before.
    plain = not any(file.suffix in OPENERS for file in files)
    return paths, sum(file.stat().st_size for file in files) if plain else None
