"""Token shards: flat arrays of token ids on disk, and a view of them as one sequence.

A data directory holds `meta.json`, `tokenizer.json`, and for each split its
shards `SPLIT-00000.npy`, ... as one-dimensional uint16 (or uint32) arrays.
Documents follow each other, each ended by the end-of-text token. `meta.json` has a
checksum of every block of tokens, which is compared when a block is first read.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from based.data.tokenizer import Tokenizer
from based.errors import BasedError

FORMAT = 1
SHARD_TOKENS = 1 << 27
# Tokens that share a checksum.
BLOCK_TOKENS = 1 << 20


class ShardWriter:
    """Appends tokens to a split's shards; keeps the open shard in memory."""

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        self._folder, self._split = folder, split
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._open: list[np.ndarray] = []
        self._open_tokens = 0
        self.shards: list[dict[str, Any]] = []

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard["tokens"] for shard in self.shards) + self._open_tokens

    def write(self, ids: np.ndarray) -> None:
        """Appends token ids."""
        self._open.append(ids.astype(self.dtype))
        self._open_tokens += len(ids)
        if self._open_tokens >= SHARD_TOKENS:
            self.close()

    def take_tail(self, count: int) -> np.ndarray:
        """Removes and returns the last tokens, as many as the open shard has of `count`."""
        joined = np.concatenate([np.empty(0, self.dtype), *self._open])
        kept = max(len(joined) - count, 0)
        self._open, self._open_tokens = [joined[:kept]], kept
        return joined[kept:]

    def close(self) -> None:
        """Writes the open shard."""
        if not self._open_tokens:
            return
        name = f"{self._split}-{len(self.shards):05d}.npy"
        array = np.concatenate(self._open)
        np.save(self._folder / name, array)
        starts = range(0, len(array), BLOCK_TOKENS)
        checksums = [zlib.crc32(array[start : start + BLOCK_TOKENS].data) for start in starts]
        shard = {"file": name, "tokens": len(array), "block": BLOCK_TOKENS, "crc32": checksums}
        self.shards.append(shard)
        self._open, self._open_tokens = [], 0


class TokenDataset:
    """One split of a data directory, as one long sequence of token ids."""

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path = Path(path)
        meta = read_meta(self.path)
        if split not in meta["splits"]:
            raise BasedError(f"{path} has no split {split!r}; it has {', '.join(meta['splits'])}")
        shards = meta["splits"][split]["shards"]
        self.vocab_size: int = meta["vocab_size"]
        self.bytes_per_token: float = meta["splits"][split]["bytes"] / max(
            sum(shard["tokens"] for shard in shards), 1
        )
        self._shards = shards
        self._arrays = [self._open(shard["file"], shard["tokens"]) for shard in shards]
        #: Blocks that were found to be what was packed, (shard, block).
        self._whole: set[tuple[int, int]] = set()
        self._starts = np.cumsum([0, *(len(array) for array in self._arrays)])

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count as int64, across shards."""
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens {start} .. {start + count} of {len(self)}")
        parts, shard = [], int(np.searchsorted(self._starts, start, side="right")) - 1
        while count > 0:
            offset = start - int(self._starts[shard])
            part = self._arrays[shard][offset : offset + count]
            self._check(part, shard, offset)
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return Tokenizer.load(self.path)

    def _check(self, part: np.ndarray, shard: int, offset: int) -> None:
        """Refuses what is not what was packed, and ids that no embedding has."""
        damage = self._changed(shard, offset, offset + len(part))
        if part.size and part.max() >= self.vocab_size:
            damage = f"holds token {part.max()}, and there are {self.vocab_size}"
        if damage:
            raise BasedError(
                f"shard {self.path / self._shards[shard]['file']} is damaged: it {damage}; "
                "pack the text anew with `based data`"
            )

    def _changed(self, shard: int, begin: int, end: int) -> str:
        """What differs in the blocks of tokens begin .. end; each is looked at once."""
        meta = self._shards[shard]
        # Shards of earlier versions have no checksums.
        if "crc32" not in meta:
            return ""
        size = meta["block"]
        for block in range(begin // size, -(-end // size)):
            if (shard, block) in self._whole:
                continue
            tokens = np.ascontiguousarray(self._arrays[shard][block * size : (block + 1) * size])
            if zlib.crc32(tokens.data) != meta["crc32"][block]:
                return f"is not what was packed, in its {size:,} tokens from {block * size:,} on"
            self._whole.add((shard, block))
        return ""

    def _open(self, name: str, tokens: int) -> np.ndarray:
        try:
            array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BasedError(f"shard {self.path / name} is missing or damaged: {error}") from error
        if array.shape != (tokens,):
            raise BasedError(f"shard {self.path / name} is not the one that meta.json describes")
        return array


def read_meta(path: Path) -> dict[str, Any]:
    """The directory's `meta.json`, or one line that says what it is not."""
    try:
        meta = json.loads((path / "meta.json").read_text())
    except FileNotFoundError:
        raise BasedError(
            f"no token shards in {path}; `based data {path} FILES` makes them"
        ) from None
    except (OSError, ValueError) as error:
        raise BasedError(f"{path / 'meta.json'} cannot be read: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise BasedError(f"{path} was packed in another format; pack it anew with `based data`")
    return meta
