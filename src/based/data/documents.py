"""Reads documents from text files, plain or compressed, in pieces of bounded size."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from based.errors import BasedError

# A longer document is cut after a line, so that no file needs to fit in memory.
PIECE_CHARACTERS = 1 << 20
OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
CORPUS = Path(__file__).parent / "corpus" / "state_of_the_union.jsonl.xz"


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and all files below the directories named, in a stable order."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise BasedError(f"there is no file or directory {path}")
        below = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files += [file for file in below if not file.name.startswith(".")]
    if not files:
        raise BasedError(f"no files in {', '.join(map(str, paths))}")
    return files


def read_pieces(file: Path) -> Iterator[Piece]:
    """The documents of one file: each line's "text" in a .jsonl, else the file is one document.

    A suffix .gz, .xz or .bz2 is decompressed on the way.
    """
    opener = OPENERS.get(file.suffix, open)
    name = file.stem if file.suffix in OPENERS else file.name
    try:
        with opener(file, "rt", encoding="utf-8", newline="") as stream:
            if name.endswith(".jsonl"):
                yield from _json_lines(stream, file)
            else:
                yield from cut(stream)
    except UnicodeDecodeError as error:
        raise BasedError(f"{file} is not UTF-8 text ({error.reason}); convert it first") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise BasedError(f"could not read {file}: {error}") from error


def _json_lines(stream: io.TextIOBase, file: Path) -> Iterator[Piece]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise BasedError(f'{file}, line {number}: not an object with a "text" field') from error
        if not isinstance(text, str):
            raise BasedError(f'{file}, line {number}: "text" is not a string')
        yield from cut(io.StringIO(text))


def cut(stream: io.TextIOBase) -> Iterator[Piece]:
    """A text in pieces; one is read ahead, so that the last is known to be the last."""
    text = stream.read(PIECE_CHARACTERS)
    while text:
        more = stream.readline() if len(text) == PIECE_CHARACTERS else ""
        following = stream.read(PIECE_CHARACTERS)
        yield Piece(text + more, ends_document=not following)
        text = following
