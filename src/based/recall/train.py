"""Training one point at all its learning rates, to the published recipe."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from based import __version__
from based.files import published
from based.recall.architectures import arithmetic_of, build_model, paper_bytes
from based.recall.config import Point, Products, Recipe
from based.recall.data import data_of
from based.recall.lanes import Lanes
from based.recall.mqar import Segment
from based.recall.steps import Stepper, stepper, train_step

# Tokens evaluated together.
TEST_TOKENS = {"cuda": 1 << 17, "cpu": 1 << 13}
# Seconds of a point's training left from which compiling its steps is worth the while.
COMPILING_PAYS = 60.0
# A running point is saved when a sweep's time is up, and at least this often, in seconds.
SAVE_EVERY = 60.0

OnEpoch = Callable[[int, dict[float, float]], None]


def hopeless(accuracies: Sequence[float], epoch: int, recipe: Recipe) -> list[bool]:
    """Which lanes cannot win any more: the committed rule of `drop_hopeless`.

    From a quarter of the epochs on, a learning rate 0.15 below the best one; and
    all others once one is above the accuracy that stops a run.
    """
    best = max(accuracies)
    late = epoch >= recipe.epochs // 4
    return [
        best > recipe.stop_above or (late and accuracy < best - 0.15) for accuracy in accuracies
    ]


@dataclass
class History:
    """What is known of one learning rate."""

    accuracies: list[float] = field(default_factory=list)
    loss: float = float("nan")
    by_task: list[float] = field(default_factory=list)
    seconds: float = 0.0
    status: str = "running"


class PointTrainer:
    """A point in training; `train` goes on until it is done or time is up.

    With `fuse` its steps are compiled (on a GPU alone: see `steps.fused`) as soon as
    an epoch has shown that those left will take longer than `COMPILING_PAYS`.
    """

    def __init__(
        self,
        point: Point,
        recipe: Recipe,
        device: torch.device,
        folder: Path | None = None,
        fuse: bool = False,
    ) -> None:
        self.point, self.recipe, self.device, self._folder = point, recipe, device, folder
        self._fuse = fuse
        arithmetic = arithmetic_of(point, recipe)
        _set_products(arithmetic)
        model = build_model(point, recipe).to(device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        products = torch.bfloat16 if arithmetic == "bf16" else None
        self.lanes = Lanes(model, recipe.learning_rates, recipe.weight_decay, products)
        self.histories = {rate: History() for rate in recipe.learning_rates}
        self.epoch = 0
        if folder is not None and (folder / "state.pt").exists():
            self._restore(folder / "state.pt")
        self._prepare()
        self._saved = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether every learning rate has come to its end."""
        return not self._running

    @property
    def _running(self) -> list[int]:
        """Lanes that have not come to their end."""
        peaks = enumerate(self.lanes.peaks)
        return [lane for lane, rate in peaks if self.histories[rate].status == "running"]

    def train(
        self, deadline: float = float("inf"), on_epoch: OnEpoch | None = None
    ) -> list[dict[str, Any]] | None:
        """Result rows, one a learning rate; None if it was put aside before `deadline`.

        `deadline` is a `time.time()`; an epoch that would end later is not begun.
        """
        data, last = data_of(self.recipe, self.device), 0.0
        while not self.done:
            if time.time() + last > deadline:
                self.save()
                return None
            began = time.monotonic()
            self._train_epoch(data.epoch(self.epoch))
            self._judge(data.test, began)
            if on_epoch is not None:
                on_epoch(self.epoch, {r: h.accuracies[-1] for r, h in self.histories.items()})
            last = time.monotonic() - began
            if self._fuse and not self._compiled and self._left(last) > COMPILING_PAYS:
                self.compile()
            if time.monotonic() - self._saved > SAVE_EVERY and not self.done:
                self.save()
        return self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """The results so far."""
        tasks = [f"{task.length}x{task.pairs}" for task in self.recipe.test]
        return [
            {
                **describe(self.point, self.recipe),
                "learning_rate": rate,
                "status": history.status,
                "accuracy": history.accuracies[-1] if history.accuracies else 0.0,
                "by_task": dict(zip(tasks, history.by_task, strict=False)),
                "epochs": len(history.accuracies),
                "loss": history.loss if isfinite(history.loss) else None,
                "curve": history.accuracies,
                "seconds": round(history.seconds, 3),
                "parameters": self.parameters,
                "state_bytes": self.lanes.model.state_bytes(self.recipe.length),
                "paper_bytes": paper_bytes(self.point, self.recipe.length),
                "stacked": self.lanes.stacked,
                "fused": getattr(self._step, "fuses", False),
                **_measured_with(self.device),
            }
            for rate, history in self.histories.items()
        ]

    def save(self) -> None:
        """Puts everything needed to go on in the folder, whole or not at all."""
        if self._folder is None:
            return
        histories = {rate: vars(history) for rate, history in self.histories.items()}
        with published(self._folder) as folder:
            torch.save(
                {
                    "recipe": self.recipe.key,
                    "epoch": self.epoch,
                    "peaks": self.lanes.peaks,
                    "lanes": self.lanes.tensors(),
                    "histories": histories,
                },
                folder / "state.pt",
            )
        self._saved = time.monotonic()

    def _restore(self, path: Path) -> None:
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if saved["recipe"] != self.recipe.key:
            return
        self.epoch = saved["epoch"]
        self.histories = {rate: History(**values) for rate, values in saved["histories"].items()}
        self.lanes.keep([self.lanes.peaks.index(rate) for rate in saved["peaks"]])
        for name, tensor in self.lanes.tensors().items():
            tensor.copy_(saved["lanes"][name])

    def compile(self) -> None:
        """From here on steps are compiled, on a GPU; takes effect with the next one."""
        self._prepare(compiled=True)

    def _prepare(self, compiled: bool = False) -> None:
        # Graphs that were recorded before give their memory back first.
        self._step: Stepper = train_step
        self._step = stepper(self.lanes, compiled, self.recipe.batch_size)
        self._compiled = compiled

    def _left(self, epoch_seconds: float) -> float:
        """Seconds until the last epoch ends, if each takes as long."""
        return 0.0 if self.done else epoch_seconds * (self.recipe.epochs - self.epoch)

    def _train_epoch(self, batches: Any) -> None:
        # Dropout is a function of the epoch, so that a run that was put aside goes on alike.
        torch.manual_seed(self.point.seed + 7919 * self.epoch)
        self.lanes.set_rate((1 + cos(pi * self.epoch / self.recipe.epochs)) / 2)
        self.lanes.losses.zero_()
        self.lanes.model.train()
        steps = 0
        for batch in batches:
            self._step(self.lanes, batch)
            steps += 1
        losses = (self.lanes.losses / steps).tolist()
        for lane in self._running:
            self.histories[self.lanes.peaks[lane]].loss = losses[lane]
        self.epoch += 1

    def _judge(self, test: list[Segment], began: float) -> None:
        """Tests every running lane, and ends those that have come to their end."""
        lanes = self._running
        accuracies = evaluate(self.lanes, lanes, test).tolist()
        means = [sum(by_task) / len(by_task) for by_task in accuracies]
        dropped = hopeless(means, self.epoch, self.recipe)
        share = (time.monotonic() - began) / len(means)
        for lane, mean, by_task, drop in zip(lanes, means, accuracies, dropped, strict=True):
            history = self.histories[self.lanes.peaks[lane]]
            history.accuracies.append(mean)
            history.by_task = by_task
            history.seconds += share
            if not isfinite(history.loss):
                history.status = "diverged"
            elif mean > self.recipe.stop_above:
                history.status = "stopped"
            elif self.epoch == self.recipe.epochs:
                history.status = "done"
            elif drop and self.recipe.drop_hopeless:
                history.status = "dropped"
        self._shrink()

    def _shrink(self) -> None:
        """Leaves out ended lanes; where steps were compiled for all, only once half have ended."""
        running, lanes = self._running, len(self.lanes.peaks)
        if running and len(running) < lanes and (not self._compiled or 2 * len(running) <= lanes):
            self.lanes.keep(running)
            self._prepare()


def describe(point: Point, recipe: Recipe) -> dict[str, Any]:
    """What a row says of where it came from."""
    return {
        "point": point.key,
        "architecture": point.architecture,
        "hidden_size": point.hidden_size,
        "dials": dict(point.dials),
        "seed": point.seed,
        "recipe": recipe.key,
        "products": arithmetic_of(point, recipe),
    }


def _measured_with(device: torch.device) -> dict[str, str]:
    """The hardware and the versions of a row."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    return {"device": name, "torch": torch.__version__, "based": __version__}


@torch.no_grad()
def evaluate(lanes: Lanes, which: Sequence[int], test: Sequence[Segment]) -> Float[Tensor, "M S"]:
    """Share of queries that some of the lanes answer right, a test segment at a time."""
    model = lanes.model.eval()
    size = TEST_TOKENS[lanes.flat.device.type]
    rows = []
    for lane in which:
        own = lanes.alone(lane)
        for part in test:
            right = torch.zeros((), device=part.tokens.device)
            for batch in part.batches(max(1, size // part.tokens.shape[1])):
                hidden = functional_call(model, own, (batch.tokens, batch.positions))
                guess = (hidden @ own["embedding.weight"].T).argmax(-1)
                right += (guess == batch.answers).sum()
            rows.append(right / part.answers.numel())
    return torch.stack(rows).unflatten(0, (len(which), len(test)))


def _set_products(products: Products) -> None:
    """float32 products in full precision, or by way of TF32."""
    precision = "highest" if products == "float32" else "high"
    torch.set_float32_matmul_precision(precision)
