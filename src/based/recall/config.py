"""What a run of the lab is: a point (which model) and a recipe (which data, how trained)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from based.errors import BasedError
from based.recall.mqar import Task, check_task

Products = Literal["float32", "tf32", "bf16"]

# The official generator's segments, and the logarithmic grid of learning rates.
TRAIN = (
    Task(64, 4, 100_000),
    Task(128, 8, 20_000),
    Task(256, 16, 20_000),
    Task(256, 32, 20_000),
    Task(256, 64, 20_000),
)
TEST = tuple(
    Task(length, pairs, 1_000)
    for length, pairs in (
        *((64, 4), (64, 8), (64, 16), (128, 32)),
        *((256, 64), (512, 128), (1024, 256)),
    )
)
LEARNING_RATES = tuple(10 ** (-3 + 0.5 * i) for i in range(4))


@dataclass(frozen=True)
class Point:
    """A model: an architecture at a width, its dials, and the seed of its weights."""

    architecture: str
    hidden_size: int
    dials: Mapping[str, int] = field(default_factory=dict)
    seed: int = 123

    @property
    def key(self) -> str:
        """A name for files and rows: unique among points."""
        dials = "".join(f"-{name}{value}" for name, value in sorted(self.dials.items()))
        return f"{self.architecture}-d{self.hidden_size}{dials}-seed{self.seed}"


@dataclass(frozen=True)
class Recipe:
    """Data and training, the same for every point. The defaults are the published ones.

    The examples are made once and come in the order of their segments in every
    epoch, as in the paper. `fresh_data` draws new ones every epoch and `shuffle`
    mixes the order of batches; neither is used for the figure.
    """

    vocab_size: int = 8192
    train: tuple[Task, ...] = TRAIN
    test: tuple[Task, ...] = TEST
    learning_rates: tuple[float, ...] = LEARNING_RATES
    epochs: int = 32
    batch_size: int = 256
    weight_decay: float = 0.1
    """On every parameter."""
    stop_above: float = 0.99
    """A run ends after the epoch whose test accuracy is above this."""
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    data_seed: int = 123
    fresh_data: bool = False
    shuffle: bool = False
    products: Products = "float32"
    """Arithmetic of matrix products: float32, or faster on a GPU."""
    drop_hopeless: bool = False
    """End a learning rate early by the rule of `based.recall.train.hopeless`."""

    def __post_init__(self) -> None:
        for task in (*self.train, *self.test):
            check_task(task, self.vocab_size)
        if not self.train or not self.test or not self.learning_rates:
            raise BasedError("a recipe needs training tasks, test tasks and learning rates")
        if self.epochs < 1 or self.batch_size < 1:
            raise BasedError("epochs and batch_size must be at least 1")

    @property
    def is_published_task(self) -> bool:
        """Whether results can stand beside the paper's: its data, however trained."""
        return (self.vocab_size, self.train, self.test) == (8192, TRAIN, TEST)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence: where states are measured."""
        return max(task.length for task in (*self.train, *self.test))

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def key(self) -> str:
        """Short hash of all that changes the result of one learning rate."""
        values = {k: v for k, v in self.to_dict().items() if k != "learning_rates"}
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The inverse of `Recipe.to_dict`; the key that a directory adds is ignored."""
    known = {name: value for name, value in values.items() if name != "key"}
    for name in ("train", "test"):
        known[name] = tuple(Task(*task) for task in known[name])
    return Recipe(**{**known, "learning_rates": tuple(known["learning_rates"])})


def small_recipe() -> Recipe:
    """A reduced task that two CPU cores learn in seconds: the demo's."""
    return Recipe(
        vocab_size=128,
        train=(Task(32, 4, 4096), Task(64, 8, 4096), Task(64, 16, 4096)),
        test=tuple(Task(length, pairs, 256) for length, pairs in ((32, 4), (64, 8), (64, 16))),
        learning_rates=(1e-2,),
        epochs=6,
        batch_size=64,
    )
