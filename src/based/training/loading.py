"""The sequences of each step, read while the device computes the step before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from jaxtyping import Int
from torch import Tensor

from based.data import Mixture, TokenDataset, Windows
from based.training.config import TrainConfig


class Loader:
    """The sequences `first` .. `first + count` of each step's batch, one step ahead.

    What a step reads is a function of its number, so nothing else is kept of the
    position in the data.
    """

    def __init__(self, windows: Windows | Mixture, batch_size: int, first: int, count: int) -> None:
        self.windows, self.batch_size, self.first, self.count = windows, batch_size, first, count
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[int, Future[Tensor]] | None = None

    def rows(self, step: int) -> Int[Tensor, "B T1"]:
        """Those of a step, counted from 0; raises here what reading them raised."""
        ahead, self._ahead = self._ahead, None
        rows = self._read(step) if ahead is None or ahead[0] != step else ahead[1].result()
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        return rows

    def _read(self, step: int) -> Int[Tensor, "B T1"]:
        return self.windows.batch(step * self.batch_size + self.first, self.count)


def training_windows(config: TrainConfig, dataset: TokenDataset) -> Windows | Mixture:
    """The run's sequences in order: of its data directory, or of several by weight."""
    windows = Windows(dataset, config.length, config.seed)
    if not config.mixture:
        return windows
    others = [Windows(TokenDataset(path), config.length, config.seed) for path, _ in config.mixture]
    weights = [weight for _, weight in config.mixture]
    return Mixture([windows, *others], [1 - sum(weights), *weights], config.seed)
