"""The training loop, from one device to many: resumable at every step it has a checkpoint of.

A run's directory, which all ranks of the job see:

    train.json       the options
    metrics.jsonl    one row a step, one an evaluation
    loss.png         the same as a picture
    checkpoints/     the newest ones
    model/           the trained model, once the run has finished

What happens at a step depends only on the weights, the optimiser's state, the
random generator (all in the checkpoint) and the step's number, so a resumed run
is the run that was never interrupted: bit for bit on as many CPU ranks as before,
up to rounding on another number.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from based.data import Mixture, TokenDataset, Windows
from based.errors import BasedError
from based.evaluation import Perplexity, Share, evaluate
from based.models import Decoder, save_model
from based.models.accounting import training_flops
from based.training.checkpoint import Checkpoints
from based.training.config import TrainConfig
from based.training.hardware import peak_flops, peak_memory
from based.training.learner import Learner
from based.training.loggers import Logger, LoggerName, open_logger
from based.training.metrics import MetricsLog, plot_metrics
from based.training.optimizer import learning_rate
from based.training.parallel import Ranks, lost_contact


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
    """Of all ranks together."""
    peak_share: float | None = None
    """Model flops as a share of what the ranks can do; None where that is not known."""
    memory_bytes: int | None = None
    """Most that this rank's GPU has held; None on a CPU."""


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
    """A run in a directory: `train()` begins it or goes on with it.

    Every rank of the job has one. Rank 0 reports, and writes all but its own part of
    the checkpoints.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        reporter: Reporter,
        device: torch.device,
        loggers: Sequence[LoggerName] = (),
    ) -> None:
        self.config, self.folder, self.reporter, self.device = config, folder, reporter, device
        self.stop_requested = False
        self.ranks = Ranks(device, config.context_parallel, config.shards)
        self._sequences = config.sequences_of_rank(self.ranks.data_ranks)
        dataset = TokenDataset(config.data)
        self.windows = training_windows(config, dataset)
        self.held_out = Windows(TokenDataset(config.data, "validation"), config.length)
        end_of_text = dataset.tokenizer().eos_id if config.separate_documents else None
        self.learner = Learner(config.model_config(dataset), config, self.ranks, end_of_text)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints, self.ranks)
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.step = 0
        self._saved_step = 0
        self._logger_names, self._loggers = loggers, list[Logger]()
        peak = peak_flops(device)
        flops = training_flops(self.learner.model, config.length)
        self._share_of_one = None if peak is None else flops / (peak * self.ranks.size)

    @property
    def model(self) -> Decoder:
        """The model; its weights are sharded where there are several ranks."""
        return self.learner.model

    def train(self) -> Decoder | None:
        """Trains to the last step and exports the model, which it returns on rank 0.

        None if the run was asked to stop before, and on other ranks.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder, wanted=self.ranks.rank == 0):
            self._resume()
            try:
                return self._train()
            except BaseException as error:
                with suppress(Exception):
                    self.checkpoints.wait()
                if (reason := lost_contact(error)) is None:
                    raise
                raise BasedError(
                    f"another rank was lost in step {self.step + 1} ({reason}); the checkpoint of "
                    f"step {max(self.checkpoints.steps(), default=0)} is whole: start the same "
                    "command again"
                ) from error
            finally:
                for logger in self._loggers:
                    logger.close()

    def advance(self) -> Step:
        """One optimiser step; raises `BasedError`, the weights untouched, on an infinite loss."""
        config, began = self.config, time.perf_counter()
        rate = learning_rate(config, self.step)
        loss, norm = self._gradients()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise BasedError(
                f"the loss is {loss} and the gradient norm {norm} at step {self.step + 1}; "
                f"the weights of that step were not taken, and the checkpoint of step "
                f"{self._saved_step} is kept: try a lower learning rate or stronger clipping"
            )
        self.learner.update(rate)
        self.step += 1
        per_step = config.batch_size * config.length
        speed = per_step / (time.perf_counter() - began)
        share = None if self._share_of_one is None else speed * self._share_of_one
        memory = peak_memory(self.device)
        return Step(self.step, self.step * per_step, loss, norm, rate, speed, share, memory)

    def _train(self) -> Decoder | None:
        while self.step < self.config.steps and not self.stop_requested:
            step = self.advance()
            self._log(**{name: value for name, value in vars(step).items() if value is not None})
            if self.ranks.rank == 0:
                self.reporter.on_step(step)
            last = self.step == self.config.steps
            if last or self.step % self.config.evaluate_every == 0:
                self._evaluate(last)
            if last or self.step % self.config.checkpoint_every == 0 or self.stop_requested:
                self._save()
        self.checkpoints.wait()
        if self.step < self.config.steps:
            self._say(f"stopped after step {self.step}; the same command goes on from there")
            return None
        return self._export()

    def _gradients(self) -> tuple[float, float]:
        """The step's mean loss and gradient norm; a wish to stop becomes everybody's."""
        first = self.step * self.config.batch_size + self.ranks.data_rank * self._sequences
        mine, norm = self.learner.gradients(self.windows.batch(first, self._sequences))
        loss, stops = self.ranks.sum(mine, float(self.stop_requested))
        self.stop_requested = stops > 0
        return loss, norm

    def _evaluate(self, last: bool) -> None:
        result = evaluate(
            self.model,
            self.held_out,
            self.config.micro_batch or self._sequences,
            None if last else self.config.evaluate_windows,
            share=Share(
                self.ranks.data_rank,
                self.ranks.data_ranks,
                self.learner.columns(self.config.length),
            ),
        )
        result = Perplexity(self.ranks.sum_(result.nll), self.ranks.sum_(result.tokens))
        tokens = self.step * self.config.batch_size * self.config.length
        self._log(step=self.step, tokens=tokens, **_without(result.as_dict(), "tokens"))
        if self.ranks.rank == 0:
            self.reporter.on_evaluation(self.step, result)

    def _log(self, **row: Any) -> None:
        if self.ranks.rank == 0:
            self.metrics.append(**row)
            for logger in self._loggers:
                logger.log(row)

    def _say(self, text: str) -> None:
        if self.ranks.rank == 0:
            self.reporter.on_message(text)

    def _state(self) -> dict[str, Any]:
        state = {**self.learner.state(), "random": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _save(self) -> None:
        self.checkpoints.save(self.step, self._state())
        self._saved_step = self.step

    def _resume(self) -> None:
        refusal = self.ranks.from_first(self._claim() if self.ranks.rank == 0 else None)
        if refusal is not None:
            raise BasedError(refusal)
        self.step = self._saved_step = self.checkpoints.newest(self._say)
        if self.ranks.rank == 0:
            self.metrics.keep_until(self.step)
            self._loggers = [
                open_logger(name, self.folder, self.step, self.config.as_dict())
                for name in self._logger_names
            ]
        if self.step == 0:
            return
        # Only now: to describe an optimiser that has not stepped, the library makes it step.
        state = self._state()
        self.checkpoints.load(self.step, state)
        self.learner.load(state)
        torch.set_rng_state(state["random"])
        if "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self._say(f"going on from the checkpoint of step {self.step}")

    def _claim(self) -> str | None:
        """Makes the directory this run's; says why not if it is another's."""
        options = self.folder / "train.json"
        try:
            if options.exists():
                self.config.check_same_run(options)
        except BasedError as error:
            return str(error)
        self.config.save(options)
        self.checkpoints.remove_unfinished()
        return None

    def _export(self) -> Decoder | None:
        model = self.learner.whole_model()
        if model is None:
            return None
        save_model(model, self.folder / "model", self.config.data / "tokenizer.json")
        plot_metrics(self.metrics.rows(), self.folder / "loss.png", self.config.preset)
        return model.eval()


def training_windows(config: TrainConfig, dataset: TokenDataset) -> Windows | Mixture:
    """The run's sequences in order: of its data directory, or of several by weight."""
    windows = Windows(dataset, config.length, config.seed)
    if not config.mixture:
        return windows
    others = [Windows(TokenDataset(path), config.length, config.seed) for path, _ in config.mixture]
    weights = [weight for _, weight in config.mixture]
    return Mixture([windows, *others], [1 - sum(weights), *weights], config.seed)


@contextmanager
def _locked(folder: Path, wanted: bool) -> Iterator[None]:
    """Holds the run for this process, if it is the one to hold it."""
    if not wanted:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BasedError(f"another process is training in {folder}") from None
        yield


def _without(row: dict[str, float], name: str) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != name}
