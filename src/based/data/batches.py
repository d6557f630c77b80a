"""The order of training data: a pure function of seed and position, so nothing is stored.

The sequence of tokens is cut into windows of `length` inputs, each with its next
tokens as targets. An epoch reads every window once, in an order of its own and
from an offset of its own; window i of a run belongs to epoch i // windows.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from based.data.shards import TokenDataset
from based.errors import BasedError


class Windows:
    """Windows of `length + 1` tokens of a split; the last is the first one's target shifted."""

    def __init__(self, dataset: TokenDataset, length: int, seed: int = 0) -> None:
        self.dataset, self.length, self.seed = dataset, length, seed
        if length < 1:
            raise BasedError(f"the sequence length is {length}; it must be at least 1")
        self.count = (len(dataset) - 1) // length
        if self.count < 1:
            raise BasedError(
                f"the split in {dataset.path} has {len(dataset)} tokens, fewer than the "
                f"{length + 1} of one sequence; use more text or a shorter sequence length"
            )
        self._order = lru_cache(maxsize=2)(self._epoch)

    def batch(self, first: int, size: int) -> Int[Tensor, "B T1"]:
        """Windows first .. first + size of the run, shuffled within each epoch."""
        return self._stack([self._shuffled(index) for index in range(first, first + size)])

    def in_order(self, first: int, size: int) -> Int[Tensor, "B T1"]:
        """Windows first .. first + size of the text, as many as there are."""
        last = min(first + size, self.count)
        return self._stack([index * self.length for index in range(first, last)])

    def _stack(self, starts: list[int]) -> Int[Tensor, "B T1"]:
        rows = [self.dataset.read(start, self.length + 1) for start in starts]
        return torch.from_numpy(np.stack(rows))

    def _shuffled(self, index: int) -> int:
        epoch, position = divmod(index, self.count)
        offset, order = self._order(epoch)
        return offset + int(order[position]) * self.length

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """The epoch's offset into the text and its order of windows."""
        random = np.random.default_rng([self.seed, epoch])
        slack = len(self.dataset) - 1 - self.count * self.length
        return int(random.integers(slack + 1)), random.permutation(self.count)
