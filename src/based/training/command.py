"""`based train`: train a model on token shards, with live progress."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from based.training.config import TrainConfig

if TYPE_CHECKING:
    from based.training.trainer import Trainer


@dataclass(frozen=True)
class Train:
    """Train a model on token shards, or go on with a run that was interrupted.

    The same command does both: a run continues from its newest checkpoint, bit for
    bit on a CPU. Ctrl-C saves a checkpoint and stops.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run: checkpoints, metrics, and at the end the model."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field()
    """What to train."""
    device: str = "auto"
    """cpu, cuda, ...; auto is a GPU if there is one."""


def run(options: Train) -> None:
    """Trains, showing progress."""
    from rich.console import Console

    from based.models.device import pick_device
    from based.training.progress import TrainingProgress
    from based.training.trainer import Trainer

    console = Console()
    device = pick_device(options.device)
    with TrainingProgress(console, options.config.steps) as progress:
        trainer = Trainer(options.config, options.run, progress, device)
        progress.on_message(
            f"{options.config.preset}: {trainer.model.num_parameters():,} parameters, "
            f"{trainer.windows.count:,} windows of {options.config.length} tokens an epoch, "
            f"on {device}"
        )
        _stop_on_signal(trainer)
        model = trainer.train()
    if model is not None:
        console.print(f"saved {options.run / 'model'}, picture {options.run / 'loss.png'}")
        console.print(f"next: based generate {options.run} --prompt 'Fellow citizens,'")


def _stop_on_signal(trainer: Trainer) -> None:
    """The first Ctrl-C or SIGTERM asks the run to save and stop; a second one ends it."""

    def handler(number: int, frame: object) -> None:
        trainer.stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
