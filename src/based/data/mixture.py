"""Several data directories as one stream of windows, by weight: a pure function of position.

A block of 1,024 windows of the run holds a fixed number from each directory, in an
order of its own; so window i is found without counting those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from based.data.batches import Windows
from based.errors import BasedError

BLOCK = 1024


class Mixture:
    """Windows of several directories; `weights` are their shares and sum to 1."""

    def __init__(self, parts: Sequence[Windows], weights: Sequence[float], seed: int = 0) -> None:
        self.parts, self.seed = parts, seed
        if min(weights) <= 0 or abs(sum(weights) - 1) > 1e-6:
            raise BasedError(
                f"the shares of the data directories are {', '.join(f'{w:g}' for w in weights)}; "
                "each must be above 0, and those of --mixture sum to less than 1"
            )
        for part in parts[1:]:
            _check_same_tokenizer(parts[0], part)
        self._counts = _apportion(weights)
        self._order = lru_cache(maxsize=4)(self._block)

    @property
    def count(self) -> int:
        """Windows of all directories together."""
        return sum(part.count for part in self.parts)

    def batch(self, first: int, size: int) -> Int[Tensor, "B T1"]:
        """Windows first .. first + size of the run."""
        return torch.cat([self._window(index) for index in range(first, first + size)])

    def _window(self, index: int) -> Int[Tensor, "1 T1"]:
        block, slot = divmod(index, BLOCK)
        parts, ranks = self._order(block)
        part = int(parts[slot])
        return self.parts[part].batch(block * self._counts[part] + int(ranks[slot]), 1)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each slot of a block: its directory, and how many of that one come before it."""
        random = np.random.default_rng([self.seed, block])
        parts = random.permutation(np.repeat(np.arange(len(self.parts)), self._counts))
        ranks = np.empty(BLOCK, dtype=np.int64)
        for part, count in enumerate(self._counts):
            ranks[parts == part] = np.arange(count)
        return parts, ranks


def _apportion(weights: Sequence[float]) -> list[int]:
    """Windows of each directory in a block: largest remainders, and at least one."""
    exact = np.array(weights) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact), 1).astype(int)
    missing = max(BLOCK - int(counts.sum()), 0)
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    counts[np.argmax(counts)] += BLOCK - counts.sum()
    return counts.tolist()


def _check_same_tokenizer(a: Windows, b: Windows) -> None:
    first, second = ((w.dataset.path / "tokenizer.json").read_bytes() for w in (a, b))
    if first != second:
        raise BasedError(
            f"{b.dataset.path} was packed with another tokenizer than {a.dataset.path}; "
            f"pack it with `based data --tokenizer {a.dataset.path / 'tokenizer.json'}`"
        )
