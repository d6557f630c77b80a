"""The examples of a recipe, made once and kept on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from based.recall.config import Recipe
from based.recall.mqar import Segment, Task, segment

# Seeds of train and test segments never meet: far more apart than a recipe has segments.
TEST_SEED = 1 << 20


class Data:
    """Training and test segments of a recipe on one device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self.train = self._make(recipe.train, first=0)
        self.test = self._make(recipe.test, first=TEST_SEED)

    def epoch(self, number: int) -> Iterator[Segment]:
        """Training batches in the order of their segments, never of two at once.

        Every epoch is the same unless the recipe says `fresh_data` or `shuffle`.
        """
        recipe, train = self._recipe, self.train
        if recipe.fresh_data and number:
            train = self._make(recipe.train, first=2 * TEST_SEED + number * len(recipe.train))
        if not recipe.shuffle:
            for part in train:
                yield from part.batches(recipe.batch_size)
            return
        generator = torch.Generator().manual_seed(recipe.data_seed + number)
        batches = [
            batch for part in train for batch in _mixed(part, generator).batches(recipe.batch_size)
        ]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]

    def _make(self, tasks: tuple[Task, ...], first: int) -> list[Segment]:
        recipe = self._recipe
        return [
            segment(task, recipe.vocab_size, seed=recipe.data_seed + first + i).to(self._device)
            for i, task in enumerate(tasks)
        ]


@lru_cache(maxsize=1)
def data_of(recipe: Recipe, device: torch.device) -> Data:
    """The data, made once a process: the points of a sweep share it."""
    return Data(recipe, device)


def _mixed(part: Segment, generator: torch.Generator) -> Segment:
    order = torch.randperm(len(part.tokens), generator=generator).to(part.tokens.device)
    return Segment(*(tensor[order] for tensor in part))
