"""`based data`: from text files to token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Data:
    """Train a byte-level BPE tokenizer on text files and pack them into token shards.

    A .jsonl file holds one document a line, in its field "text"; any other file is
    one document. Files may be compressed (.gz, .xz, .bz2). Without files, the
    corpus that ships with Based is packed: the State of the Union addresses.
    """

    out: Annotated[Path, tyro.conf.Positional]
    """The data directory to write, e.g. data/mine."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Text files, and directories of them."""
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

    from based.data.documents import CORPUS, OPENERS, find_files
    from based.data.prepare import prepare
    from based.data.tokenizer import Tokenizer

    console = Console()
    paths = list(config.files) or [CORPUS]
    files = find_files(paths)
    plain = not any(file.suffix in OPENERS for file in files)
    # Text is counted as it is read; of compressed files the total is not known before.
    total = sum(file.stat().st_size for file in files) if plain else None
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
            paths,
            config.out,
            config.vocab_size,
            tokenizer=tokenizer,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
            on_bytes=on_bytes,
        )
    console.print(f"{packed.documents} documents, vocabulary {packed.vocab_size}")
    for split, tokens in packed.tokens.items():
        size = packed.text_bytes[split]
        console.print(f"{split:>10}: {tokens:,} tokens of {size / max(tokens, 1):.2f} bytes")
    console.print(f"next: based train RUN --data {config.out}")
