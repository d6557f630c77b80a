"""`based train`: train a model on token shards, with live progress."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import tyro

from based.errors import BasedError
from based.training.config import TrainConfig
from based.training.loggers import LoggerName
from based.training.recipes import as_arguments, recipe

if TYPE_CHECKING:
    import torch

    from based.training.trainer import Trainer


@dataclass(frozen=True)
class Train:
    """Train a model on token shards, or go on with a run that was interrupted.

    The same command does both: a run continues from its newest checkpoint, bit for
    bit on a CPU. Ctrl-C saves a checkpoint and stops. Several GPUs, several machines:
    `torchrun --nproc-per-node 8 -m based train ...` (docs/training.md).
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run: checkpoints, metrics, and at the end the model."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field()
    """What to train."""
    recipe: str | None = None
    """Options of one of the paper's runs, e.g. based-360m-10b; options given beside it win."""
    device: str = "auto"
    """cpu, cuda, ...; auto is a GPU if there is one."""
    log: tuple[LoggerName, ...] = ()
    """Where the numbers go besides metrics.jsonl."""
    dry_run: bool = False
    """Print what the run will take, and train nothing."""
    ranks: int | None = None
    """For --dry-run: how many GPUs; as many as were launched unless given."""
    rate: float | None = None
    """For --dry-run: tokens a second and GPU, to tell the time from."""


def expand(arguments: list[str]) -> list[str]:
    """Puts the recipe's options before those that were given."""
    for number, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--recipe":
            value = value or "".join(arguments[number + 1 : number + 2])
            return [*as_arguments(recipe(value)), *arguments]
    return arguments


def run(options: Train) -> None:
    """Trains, showing progress; of several ranks one speaks."""
    from based.models.device import pick_device
    from based.training.parallel import job_ranks, join_job

    if options.dry_run:
        _print_plan(options, options.ranks or job_ranks(), pick_device(options.device))
        return
    if job_ranks() == 1:
        _train(options, pick_device(options.device))
        return
    failed = options.run / ".failed"
    if os.environ["RANK"] == "0":
        failed.unlink(missing_ok=True)
    _end_when_told(failed)
    try:
        _train(options, join_job(options.device))
    except BasedError as error:
        # Others may be waiting for this rank, and it for them: no farewell.
        _end(failed, str(error))


def _train(options: Train, device: torch.device) -> None:
    import torch.distributed as dist
    from rich.console import Console

    from based.training.progress import TrainingProgress
    from based.training.trainer import Trainer

    first = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(quiet=not first)
    with TrainingProgress(console, options.config.steps) as progress:
        trainer = Trainer(options.config, options.run, progress, device, options.log)
        ranks = f"{trainer.ranks.size} x " if trainer.ranks.size > 1 else ""
        progress.on_message(
            f"{options.config.preset}: {trainer.model.num_parameters():,} parameters, "
            f"{trainer.windows.count:,} windows of {options.config.length} tokens an epoch, "
            f"on {ranks}{device.type}"
        )
        _stop_on_signal(trainer)
        model = trainer.train()
    if model is not None:
        console.print(f"saved {options.run / 'model'}, picture {options.run / 'loss.png'}")
        console.print(f"next: based generate {options.run} --prompt 'Fellow citizens,'")
    if dist.is_initialized():
        dist.destroy_process_group()


def _print_plan(options: Train, ranks: int, device: torch.device) -> None:
    from rich.console import Console

    from based.training.plan import make_plan

    Console().print(make_plan(options.config, ranks, device).table(options.rate))


def _stop_on_signal(trainer: Trainer) -> None:
    """The first signal asks the run to save and stop; a second one ends it.

    Several ranks stop together when any of them gets SIGUSR1; SIGTERM ends them at once.
    """

    def handler(number: int, frame: object) -> None:
        trainer.stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    alone: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    for number in alone if trainer.ranks.size == 1 else (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, handler)


def _end_when_told(failed: Path) -> None:
    """SIGTERM, which the launcher sends when a rank has died, ends this one with a line.

    A thread waits for it: the main one may be waiting for the network or a GPU, where a
    handler would not run. So it comes before all other threads.
    """

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        _end(
            failed,
            "the job was told to end, as when another rank is lost; its newest checkpoint is "
            "whole: start the same command again",
        )

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def _end(failed: Path, reason: str) -> NoReturn:
    """Ends this rank at once; the first of them says why."""
    if _is_first(failed):
        print(f"based: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _is_first(marker: Path) -> bool:
    """Whether no other rank made the marker before."""
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch(exist_ok=False)
    except OSError:
        return not marker.exists()
    return True
