"""The training loop of one device: resumable at every step it has a checkpoint of.

A run's directory:

    train.json       the options
    metrics.jsonl    one row a step, one an evaluation
    loss.png         the same as a picture
    checkpoints/     the newest ones
    model/           the trained model, once the run has finished

What happens at a step depends only on the weights, the optimiser's state, the
random generator (all in the checkpoint) and the step's number, so a resumed run
is the run that was never interrupted, bit for bit on a CPU.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F

from based.data import TokenDataset, Windows
from based.errors import BasedError
from based.evaluation import Perplexity, evaluate
from based.models import Decoder, save_model
from based.training.checkpoint import Checkpoints
from based.training.config import TrainConfig
from based.training.metrics import MetricsLog, plot_metrics
from based.training.optimizer import build_optimizer, learning_rate


@dataclass(frozen=True)
class Step:
    """What is known after a step."""

    step: int
    tokens: int
    """Of all steps so far."""
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float


@runtime_checkable
class Reporter(Protocol):
    """Is told what happens; the command shows it, a test records it."""

    def on_step(self, step: Step) -> None:
        """After every step."""

    def on_evaluation(self, step: int, result: Perplexity) -> None:
        """After every evaluation."""

    def on_message(self, text: str) -> None:
        """A thing worth a line: resumed, a damaged checkpoint, saved."""


class Trainer:
    """A run in a directory: `train()` begins it or goes on with it."""

    def __init__(
        self, config: TrainConfig, folder: Path, reporter: Reporter, device: torch.device
    ) -> None:
        self.config, self.folder, self.reporter, self.device = config, folder, reporter, device
        self.stop_requested = False
        dataset = TokenDataset(config.data)
        self.windows = Windows(dataset, config.length, config.seed)
        self.held_out = Windows(TokenDataset(config.data, "validation"), config.length)
        shape = config.model_config(dataset)
        torch.manual_seed(config.seed)
        self.model = Decoder(shape).to(device)
        self.optimizer = build_optimizer(self.model, config)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.step = 0
        self._saved_step = 0

    def train(self) -> Decoder | None:
        """Trains to the last step and exports the model; None if it was asked to stop before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            self._resume()
            return self._train()

    def _train(self) -> Decoder | None:
        while self.step < self.config.steps and not self.stop_requested:
            self._one_step()
            last = self.step == self.config.steps
            if last or self.step % self.config.evaluate_every == 0:
                self._evaluate(last)
            if last or self.step % self.config.checkpoint_every == 0 or self.stop_requested:
                self._save()
        if self.step < self.config.steps:
            self.reporter.on_message(
                f"stopped after step {self.step}; the same command goes on from there"
            )
            return None
        self._export()
        return self.model.eval()

    def _one_step(self) -> None:
        config, began = self.config, time.perf_counter()
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._accumulate(self.step)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise BasedError(
                f"the loss is {loss} and the gradient norm {norm} at step {self.step + 1}; "
                f"the weights of that step were not taken, and the checkpoint of step "
                f"{self._saved_step} is kept: try a lower learning rate or stronger clipping"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        per_step = config.batch_size * config.length
        speed = per_step / (time.perf_counter() - began)
        report = Step(self.step, self.step * per_step, loss, norm, rate, speed)
        self.metrics.append(**vars(report))
        self.reporter.on_step(report)

    def _accumulate(self, step: int) -> float:
        """Gradients of the step's mean loss, micro-batch by micro-batch."""
        config = self.config
        batch = self.windows.batch(step * config.batch_size, config.batch_size).to(self.device)
        total = torch.zeros((), device=self.device)
        for part in batch.chunk(config.accumulation):
            loss = self._loss(part) / config.accumulation
            loss.backward()
            total += loss.detach()
        return total.item()

    def _loss(self, batch: Int[Tensor, "B T1"]) -> Tensor:
        dtype = self.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits, _ = self.model(batch[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of activations where it is not the weights' own."""
        choice = self.config.precision
        on_gpu = self.device.type == "cuda"
        return torch.bfloat16 if choice == "bfloat16" or (choice == "auto" and on_gpu) else None

    def _evaluate(self, last: bool) -> None:
        most = None if last else self.config.evaluate_windows
        result = evaluate(
            self.model,
            self.held_out,
            self.config.batch_size // self.config.accumulation,
            most,
            self.autocast,
        )
        tokens = self.step * self.config.batch_size * self.config.length
        self.metrics.append(step=self.step, tokens=tokens, **_without(result.as_dict(), "tokens"))
        self.reporter.on_evaluation(self.step, result)

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "random": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _save(self) -> None:
        self.checkpoints.save(self.step, self._state())
        self._saved_step = self.step

    def _resume(self) -> None:
        options = self.folder / "train.json"
        if options.exists():
            self.config.check_same_run(options)
        self.config.save(options)
        self.checkpoints.remove_unfinished()
        state = self._state()
        self.step = self.checkpoints.load_newest(state, self.reporter.on_message)
        self._saved_step = self.step
        self.metrics.keep_until(self.step)
        if self.step == 0:
            return
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        torch.set_rng_state(state["random"])
        if "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.reporter.on_message(f"going on from the checkpoint of step {self.step}")

    def _export(self) -> None:
        save_model(self.model, self.folder / "model", self.config.data / "tokenizer.json")
        plot_metrics(self.metrics.rows(), self.folder / "loss.png", self.config.preset)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the run for this process."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BasedError(f"another process is training in {folder}") from None
        yield


def _without(row: dict[str, float], name: str) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != name}
