"""What keeps a device busy: nothing waits for it, and its next sequences are there."""

import threading
from pathlib import Path

import pytest
import ranks
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from based.data import Windows
from based.errors import BasedError
from based.models.presets import based_model
from based.training import TrainConfig
from based.training.learner import Learner
from based.training.loading import Loader
from based.training.parallel import Ranks

SHAPE = based_model(32, 4, (1,), (2,), num_heads=4, feature_dim=4, window=5, vocab_size=64)


class Waits(TorchDispatchMode):
    """Counts values that Python reads, for which it would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waits(precision: str) -> tuple[int, int]:
    """While a step is launched, and when its loss is read."""
    config = TrainConfig(
        Path("synthetic"), batch_size=4, micro_batch=2, length=8, precision=precision
    )
    learner = Learner(SHAPE, config, Ranks(torch.device("cpu")))
    rows = torch.randint(64, (4, 9))
    learner.gradients(rows)
    learner.update(1e-3)  # the optimiser's state is made
    with Waits() as launched:
        loss, norm = learner.gradients(rows)
        learner.update(1e-3)
    with Waits() as read:
        assert loss.item() > 0
        assert norm.item() > 0
    return launched.count, read.count


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_is_launched_without_a_wait(precision) -> None:
    assert ranks.run(1, waits, precision) == [(0, 2)]


class Casts(TorchDispatchMode):
    """Counts casts of as many float32 numbers as a projection of the MLP has to bfloat16."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.count += out.dtype == torch.bfloat16 and out.numel() == self.numel
        return out


def casts() -> list[int]:
    """Of a step of one micro-batch, of two, and of four."""
    found = []
    for micro_batch in (4, 2, 1):
        config = TrainConfig(
            Path("synthetic"), batch_size=4, micro_batch=micro_batch, length=8, precision="bfloat16"
        )
        learner = Learner(SHAPE, config, Ranks(torch.device("cpu")))
        assert learner.model.blocks[0].mlp.fc1.weight.dtype == torch.float32
        with Casts(learner.model.blocks[0].mlp.fc1.weight.numel()) as seen:
            learner.gradients(torch.randint(64, (4, 9)))
        found.append(seen.count)
    return found


def test_weights_are_cast_once_a_step() -> None:
    (found,) = ranks.run(1, casts)
    # Four MLPs and two convolutions have a projection of that size.
    assert found == [6] * 3


class Recorded(Windows):
    """Windows that remember who read what."""

    def __init__(self) -> None:
        self.read, self.done = [], threading.Semaphore(0)

    def batch(self, first: int, size: int) -> torch.Tensor:
        self.read.append((first, size, threading.current_thread() is threading.main_thread()))
        self.done.release()
        if first >= 24:
            raise BasedError("shard 0 is damaged")
        return torch.full((size, 3), first)


def test_sequences_are_read_a_step_ahead_by_a_thread() -> None:
    windows = Recorded()
    loader = Loader(windows, batch_size=8, first=2, count=4)
    assert loader.rows(0).tolist() == [[2] * 3] * 4
    assert all(windows.done.acquire(timeout=10) for _ in range(2))
    assert windows.read == [(2, 4, True), (10, 4, False)]
    assert loader.rows(1)[0, 0] == 10
    # A step that does not follow is read when it is asked for.
    assert loader.rows(0)[0, 0] == 2
    # What is wrong with a step's sequences is said in that step.
    assert loader.rows(2)[0, 0] == 18
    with pytest.raises(BasedError, match="damaged"):
        loader.rows(3)
