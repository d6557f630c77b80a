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

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from based.data import TokenDataset, Windows
from based.errors import BasedError
from based.evaluation import Perplexity, Share, evaluate
from based.files import held
from based.models import Decoder, save_model
from based.models.accounting import training_flops
from based.training.checkpoint import Checkpoints
from based.training.config import TrainConfig
from based.training.hardware import OnItsWay, peak_flops, peak_memory
from based.training.learner import Learner
from based.training.loading import Loader, training_windows
from based.training.loggers import Logger, LoggerName, open_logger
from based.training.metrics import MetricsLog, plot_metrics
from based.training.optimizer import learning_rate
from based.training.parallel import Ranks, lost_contact
from based.training.reports import Reporter, Step


class Flying(NamedTuple):
    """A step that was launched: its loss, wishes to stop and gradient norm arrive later."""

    step: int
    rate: float
    numbers: OnItsWay


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
        self.loader = Loader(
            self.windows,
            config.batch_size,
            self.ranks.data_rank * self._sequences,
            self._sequences,
        )
        self.held_out = Windows(TokenDataset(config.data, "validation"), config.length)
        end_of_text = dataset.tokenizer().eos_id if config.separate_documents else None
        self.learner = Learner(config.model_config(dataset), config, self.ranks, end_of_text)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints, self.ranks)
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.step = 0
        self._saved_step = 0
        # A GPU is given its next step before the host has the last one's numbers.
        self.lag = 1 if device.type == "cuda" else 0
        self._flying: list[Flying] = []
        # All ranks stop after the same step: the wish of one is summed with its loss.
        self._stopping = False
        self._clock = 0.0
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
        mine = self.ranks.rank == 0
        with held(self.folder, "training in") if mine else nullcontext():
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

    def advance(self) -> None:
        """Launches one optimiser step, and reports those whose numbers have come.

        Raises `BasedError` on a loss that is not finite; nothing of such a step is saved.
        """
        rate = learning_rate(self.config, self.step)
        share, norm = self.learner.gradients(self.loader.rows(self.step))
        self.learner.update(rate)
        wish = torch.full_like(share, self.stop_requested)
        summed = self.ranks.sum_(torch.stack([share, wish]).double())
        self.step += 1
        self._flying.append(
            Flying(self.step, rate, OnItsWay(torch.stack([*summed, norm.double()])))
        )
        self._report(keep=self.lag)

    def _report(self, keep: int = 0) -> None:
        """Reports launched steps in order, all but the `keep` last."""
        while len(self._flying) > keep:
            flying = self._flying.pop(0)
            loss, wishes, norm = flying.numbers.collect()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise BasedError(
                    f"the loss is {loss} and the gradient norm {norm} at step {flying.step}; "
                    f"nothing of that step is saved, and the checkpoint of step "
                    f"{self._saved_step} is kept: try a lower learning rate or stronger clipping"
                )
            self._stopping |= wishes > 0
            step = self._measured(flying, loss, norm)
            self._log(**{name: value for name, value in vars(step).items() if value is not None})
            if self.ranks.rank == 0:
                self.reporter.on_step(step)

    def _measured(self, flying: Flying, loss: float, norm: float) -> Step:
        """The step with its speed: time since the one before it, or since other work ended."""
        per_step = self.config.batch_size * self.config.length
        before, self._clock = self._clock, time.perf_counter()
        speed = per_step / (self._clock - before)
        share = None if self._share_of_one is None else speed * self._share_of_one
        memory = peak_memory(self.device)
        tokens = flying.step * per_step
        return Step(flying.step, tokens, loss, norm, flying.rate, speed, share, memory)

    def _train(self) -> Decoder | None:
        self._clock = time.perf_counter()
        while self.step < self.config.steps and not self._stopping:
            self.advance()
            last = self.step == self.config.steps
            evaluates = last or self.step % self.config.evaluate_every == 0
            saves = last or self.step % self.config.checkpoint_every == 0
            if evaluates or saves:
                self._report()
            if evaluates:
                self._evaluate(last)
            if saves or self._stopping:
                self._report()
                self._save()
            if evaluates or saves:
                self._clock = time.perf_counter()
        self.checkpoints.wait()
        if self.step < self.config.steps:
            self._say(f"stopped after step {self.step}; the same command goes on from there")
            return None
        return self._export()

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


def _without(row: dict[str, float], name: str) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != name}
