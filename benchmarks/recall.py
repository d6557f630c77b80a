"""Seconds a configuration of the recall lab, beside the official trainer's on this machine.

    python -m benchmarks.recall [--zoology PATH] [--epochs 3] [--products tf32] [--fuse] [--jobs 2]

Ours trains the four learning rates of a point stacked; a configuration is a quarter
of that, and with `--jobs` points side by side, as a sweep runs them, a part of it. Zoology's
trainer takes one. Both read the same examples; the first epoch is
set-up (compiling, recording, caches) and counted apart. PATH is a checkout of
HazyResearch/zoology; its `return_embeddings` default, which makes its training take
hidden states for logits, is patched in this process. Each row is written as soon as it
is known; what this device has at this commit is not timed again.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table

from based.recall.config import Point, Recipe
from based.recall.data import Data, data_of
from based.recall.mqar import IGNORE, Segment
from based.recall.train import PointTrainer
from benchmarks.rows import add_row, has_row

NAME = "recall"
POINTS = (
    Point("based", 64, {"feature_dim": 16}),
    Point("based", 128, {"feature_dim": 24}),
    Point("attention", 64),
)


@dataclass(frozen=True)
class Options:
    """What is timed."""

    zoology: Path | None = None
    """A checkout of the official trainer; without it only ours is timed."""
    epochs: int = 3
    """Epochs of ours, the first of them set-up."""
    zoology_epochs: int = 2
    """Epochs of theirs, the first of them set-up."""
    products: Literal["float32", "tf32", "bf16"] = "float32"
    only: str = ""
    """Points whose name contains this text."""
    fuse: bool = False
    """Compile our steps."""
    jobs: int = 1
    """Of ours side by side, each in a process: start `nvidia-cuda-mps-control -d` first."""
    fraction: float = 1.0
    """Of the published number of examples: for trying this script."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


class Times(NamedTuple):
    """Of one point of ours: seconds, and the best rate's accuracy after these epochs."""

    data: float
    setup: float
    epoch: float
    accuracy: float


def time_ours(point: Point, recipe: Recipe, options: Options) -> dict[str, Any]:
    if options.jobs == 1:
        found = [_time_point(point, recipe, options)]
    else:
        context = get_context("spawn")
        barrier = context.Barrier(options.jobs)
        pool = ProcessPoolExecutor(options.jobs, context, _meet_at, (barrier,))
        with pool:
            waiting = [
                pool.submit(_time_beside, point, recipe, options) for _ in range(options.jobs)
            ]
            found = [one.result() for one in waiting]
    # The slowest of those side by side.
    data, setup, epoch = (max(times) for times in zip(*(x[:3] for x in found), strict=True))
    return _row(
        "ours",
        point,
        options,
        lanes=len(recipe.learning_rates) * options.jobs,
        data=data,
        setup=setup,
        epoch=epoch,
        accuracy=found[0].accuracy,
    )


# Where processes side by side wait for each other: epochs are timed while all of them train.
_barrier: Barrier | None = None


def _meet_at(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _time_beside(point: Point, recipe: Recipe, options: Options) -> Times:
    try:
        return _time_point(point, recipe, options)
    except BaseException:
        # Who fails, out of memory perhaps, comes to no meeting: the others wait no longer.
        if _barrier is not None:
            _barrier.abort()
        raise


def _time_point(point: Point, recipe: Recipe, options: Options) -> Times:
    began = time.perf_counter()
    # Never early: all four learning rates are timed throughout.
    lasting = replace(recipe, epochs=options.epochs, stop_above=2.0)
    data_of(lasting, torch.device(options.device))
    made = time.perf_counter()
    trainer = PointTrainer(point, lasting, torch.device(options.device))
    if options.fuse:
        trainer.compile()
    ends: list[float] = []
    starts: list[float] = []

    def on_epoch(epoch: int, accuracies: dict[float, float]) -> None:
        ends.append(time.perf_counter())
        if _barrier is not None and len(ends) == 1:
            _barrier.wait()
        starts.append(time.perf_counter())

    rows = trainer.train(on_epoch=on_epoch) or []
    epochs = [end - start for start, end in zip(starts, ends[1:], strict=False)]
    return Times(
        data=made - began,
        setup=ends[0] - made,
        epoch=sum(epochs) / len(epochs),
        accuracy=max(row["accuracy"] for row in rows),
    )


def time_zoology(point: Point, recipe: Recipe, options: Options) -> dict[str, Any]:
    trainer = _official_trainer(point, recipe, options)
    times: dict[str, list[float]] = {"train_epoch": [], "test": []}
    metrics: list[dict[str, float]] = []
    for name, own in times.items():
        _timed(trainer, name, own, metrics)
    began = time.perf_counter()
    trainer.fit()
    whole = time.perf_counter() - began
    epochs = [sum(parts) for parts in zip(*times.values(), strict=True)]
    return _row(
        "zoology",
        point,
        options,
        lanes=1,
        data=0.0,
        setup=whole - sum(epochs[1:]),
        epoch=sum(epochs[1:]) / len(epochs[1:]),
        accuracy=metrics[-1]["valid/accuracy"],
    )


def _row(
    what: str,
    point: Point,
    options: Options,
    *,
    lanes: int,
    data: float,
    setup: float,
    epoch: float,
    accuracy: float,
) -> dict[str, Any]:
    whole = setup + (Recipe().epochs - 1) * epoch
    return {
        **_key(what, point, options),
        "lanes": lanes,
        "data_seconds": round(data, 3),
        "setup_seconds": round(setup, 3),
        "epoch_seconds": round(epoch, 4),
        "seconds_a_configuration": round(whole / lanes, 2),
        "accuracy_so_far": round(accuracy, 4),
    }


def _key(what: str, point: Point, options: Options) -> dict[str, Any]:
    """What a row is of."""
    return {
        "what": what,
        "point": point.key,
        "products": options.products if what == "ours" else "float32",
        "fused": options.fuse and what == "ours",
        "jobs": options.jobs if what == "ours" else 1,
        "fraction": options.fraction,
    }


def _timed(trainer: Any, name: str, seconds: list[float], metrics: list[dict[str, float]]) -> None:
    method = getattr(trainer, name)

    def timed(epoch: int) -> Any:
        began = time.perf_counter()
        result = method(epoch)
        seconds.append(time.perf_counter() - began)
        if result is not None:
            metrics.append(result)
        return result

    setattr(trainer, name, timed)


def _official_trainer(point: Point, recipe: Recipe, options: Options) -> Any:
    """Zoology's Trainer on its own model of the point and on our examples."""
    _make_importable(options)
    from zoology.config import LoggerConfig, ModelConfig, TrainConfig  # type: ignore
    from zoology.data.utils import DataSegment, _SyntheticDataset  # type: ignore
    from zoology.logger import WandbLogger  # type: ignore
    from zoology.model import LanguageModel, TokenEmbeddings  # type: ignore
    from zoology.train import Trainer, set_determinism  # type: ignore

    LanguageModel.forward.__defaults__ = (None, None, False)
    defaults = TokenEmbeddings.__init__.__defaults__
    TokenEmbeddings.__init__.__defaults__ = tuple(
        options.device if value == "cuda" else value for value in defaults
    )
    set_determinism(123)
    model = LanguageModel(ModelConfig(**_official_config(point, recipe)))
    data = Data(recipe, torch.device("cpu"))
    loaders = [
        torch.utils.data.DataLoader(
            _SyntheticDataset([DataSegment(*_labelled(part)) for part in parts], size),
            batch_size=None,
        )
        for parts, size in ((data.train, recipe.batch_size), (data.test, recipe.batch_size // 8))
    ]
    silent = WandbLogger(TrainConfig.model_construct(logger=LoggerConfig()))
    return Trainer(
        *(model, *loaders),
        max_epochs=options.zoology_epochs,
        learning_rate=1e-3,
        weight_decay=recipe.weight_decay,
        early_stopping_metric="valid/accuracy",
        early_stopping_threshold=2.0,
        device=options.device,
        logger=silent,
    )


def _make_importable(options: Options) -> None:
    """Zoology on the path, without the packages that this experiment does not use."""
    sys.path.insert(0, str(options.zoology))
    stubs = {"wandb": ModuleType("wandb"), "opt_einsum": ModuleType("opt_einsum")}
    operations = ModuleType("torchvision.ops")
    # Called with drop_path 0: the identity.
    operations.StochasticDepth = lambda p, mode: torch.nn.Identity()  # type: ignore[attr-defined]
    stubs |= {"torchvision": ModuleType("torchvision"), "torchvision.ops": operations}
    for name, stub in stubs.items():
        sys.modules.setdefault(name, stub)


def _official_config(point: Point, recipe: Recipe) -> dict[str, Any]:
    convolution = {
        "name": "zoology.mixers.base_conv.BaseConv",
        "kwargs": {"l_max": recipe.length, "kernel_size": 3, "implicit_long_conv": True},
    }
    based = {
        "l_max": recipe.length,
        "feature_dim": point.dials.get("feature_dim", 16),
        "feature_name": "taylor_exp",
        "num_key_value_heads": 1,
        "num_heads": 1,
        "train_view": "quadratic",
    }
    mixers = {
        "based": {"name": "zoology.mixers.based.Based", "kwargs": based},
        "attention": {
            "name": "zoology.mixers.attention.MHA",
            "kwargs": {"dropout": 0.1, "num_heads": 1},
        },
    }
    return {
        "block_type": "TransformerBlock",
        "d_model": point.hidden_size,
        "n_layers": 2,
        "sequence_mixer": {
            "name": "zoology.mixers.hybrid.Hybrid",
            "kwargs": {"configs": [convolution, mixers[point.architecture]]},
        },
        "state_mixer": {"name": "torch.nn.Identity", "kwargs": {}},
        "max_position_embeddings": 0,
        "vocab_size": recipe.vocab_size,
    }


def _labelled(part: Segment) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """A segment as Zoology keeps it: inputs and labels of every position."""
    inputs = part.tokens.long()
    labels = torch.full_like(inputs, IGNORE)
    labels.scatter_(1, part.positions.long(), part.answers.long())
    return inputs, labels, {"num_kv_pairs": part.answers.shape[1]}


def main(options: Options) -> None:
    console, rows = Console(), []
    recipe = replace(Recipe(), products=options.products)
    if options.fraction != 1.0:
        train, test = (
            tuple(t._replace(examples=max(64, int(t.examples * options.fraction))) for t in tasks)
            for tasks in (recipe.train, recipe.test)
        )
        recipe = replace(recipe, train=train, test=test)
    time_of = {"ours": time_ours, "zoology": time_zoology}
    systems = [name for name in time_of if name == "ours" or options.zoology is not None]
    points = [point for point in POINTS if options.only in point.key]
    for point, what in product(points, systems):
        key = _key(what, point, options)
        if has_row(NAME, key):
            continue
        row = time_of[what](point, recipe, options)
        rows.append(row)
        if options.fraction == 1.0:
            add_row(NAME, key, row)
    table = Table("", "point", "set-up, s", "an epoch, s", "a configuration, s")
    for row in rows:
        cells = ("setup_seconds", "epoch_seconds", "seconds_a_configuration")
        table.add_row(row["what"], row["point"], *(f"{row[cell]:,.2f}" for cell in cells))
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
