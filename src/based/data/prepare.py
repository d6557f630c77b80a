"""Packs documents into token shards: tokenizer, held-out split, shards, meta.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from based.data.documents import Piece, find_files, read_pieces
from based.data.encoding import Batch, encode
from based.data.hub import HubDataset
from based.data.shards import FORMAT, ShardWriter
from based.data.tokenizer import Tokenizer, train_tokenizer
from based.errors import BasedError
from based.files import published

BATCH_PIECES = 32


@dataclass(frozen=True)
class Packed:
    """What `prepare` wrote."""

    documents: int
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    vocab_size: int


def prepare(
    source: Sequence[Path] | HubDataset,
    out: Path,
    vocab_size: int,
    *,
    tokenizer: Tokenizer | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
    processes: int = 1,
    on_bytes: Callable[[str, int], None] = lambda stage, count: None,
) -> Packed:
    """Writes the data directory `out`; it appears whole or not at all.

    `source` is text files and directories of them, or a Hugging Face dataset. With
    several `processes` each tokenizes on one core; what is written is the same.
    Trains a tokenizer unless one is given. Each piece of text (a document, or a
    megabyte of a long one) is held out with probability `validation_fraction`; if
    chance holds out nothing, the end of the text is. `on_bytes(stage, count)`
    reports text read in the stages "tokenizer" and "tokens".
    """
    if not 0 < validation_fraction < 1:
        raise BasedError(
            f"validation_fraction is {validation_fraction}; it must lie between 0 and 1"
        )
    if processes < 1:
        raise BasedError(f"processes is {processes}; it must be at least 1")
    read = source.read if isinstance(source, HubDataset) else partial(_read, find_files(source))
    if tokenizer is None:
        tokenizer = train_tokenizer(_texts(read(), on_bytes), vocab_size)
    with published(out) as folder:
        tokenizer.save(folder / "tokenizer.json")
        encoded = encode(_batched(read()), tokenizer, processes)
        packed = _pack(encoded, folder, tokenizer, validation_fraction, seed, on_bytes)
    return packed


def _read(files: list[Path]) -> Iterator[Piece]:
    return chain.from_iterable(map(read_pieces, files))


def _texts(pieces: Iterator[Piece], on_bytes: Callable[[str, int], None]) -> Iterator[str]:
    for piece in pieces:
        on_bytes("tokenizer", len(piece.text.encode()))
        yield piece.text


def _pack(
    encoded: Iterator[tuple[Batch, list[np.ndarray]]],
    folder: Path,
    tokenizer: Tokenizer,
    fraction: float,
    seed: int,
    on_bytes: Callable[[str, int], None],
) -> Packed:
    random = np.random.default_rng(seed)
    writers = {s: ShardWriter(folder, s, tokenizer.vocab_size) for s in ("train", "validation")}
    sizes, documents = dict.fromkeys(writers, 0), 0
    for batch, all_ids in encoded:
        for piece, ids in zip(batch, all_ids, strict=True):
            split = "validation" if random.random() < fraction else "train"
            writers[split].write(ids)
            if piece.ends_document:
                writers[split].write(np.array([tokenizer.eos_id]))
            size = len(piece.text.encode())
            sizes[split] += size
            documents += piece.ends_document
            on_bytes("tokens", size)
    _ensure_both(writers, sizes, fraction)
    for writer in writers.values():
        writer.close()
    meta = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "documents": documents,
        "splits": {s: {"shards": w.shards, "bytes": sizes[s]} for s, w in writers.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    tokens = {split: writer.tokens for split, writer in writers.items()}
    return Packed(documents, tokens, sizes, tokenizer.vocab_size)


def _batched(pieces: Iterator[Piece]) -> Iterator[Batch]:
    while batch := tuple(islice(pieces, BATCH_PIECES)):
        yield batch


def _ensure_both(writers: dict[str, ShardWriter], sizes: dict[str, int], fraction: float) -> None:
    """Neither split stays empty: a text of few pieces is divided at its end."""
    total = sum(writer.tokens for writer in writers.values())
    if total < 2:
        raise BasedError("the files hold no text to speak of: fewer than two tokens")
    for empty, full, share in (
        ("validation", "train", fraction),
        ("train", "validation", 1 - fraction),
    ):
        if writers[empty].tokens == 0:
            count = min(max(1, round(total * share)), total - 1)
            moved = writers[full].take_tail(count)
            writers[empty].write(moved)
            part = round(sizes[full] * len(moved) / total)
            sizes[empty], sizes[full] = part, sizes[full] - part
