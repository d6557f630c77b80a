"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard, Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from based.errors import BasedError

LoggerName = Literal["tensorboard", "wandb"]


@runtime_checkable
class Logger(Protocol):
    """Takes the rows of `metrics.jsonl` as they are written."""

    def log(self, row: dict[str, Any]) -> None:
        """One step's or evaluation's numbers; `row["step"]` counts steps."""
        ...

    def close(self) -> None:
        """Writes what is still held back."""
        ...


class TensorBoardLogger:
    """Event files in `RUN/tensorboard`; rows after `step` from before a kill are hidden."""

    def __init__(self, run: Path, step: int, options: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, row: dict[str, Any]) -> None:
        """One scalar a number."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flushes."""
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run, named like the directory; a resumed run goes on in it."""

    def __init__(self, run: Path, step: int, options: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        kept = run / "wandb.id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            id=kept.read_text(), name=run.name, dir=str(run), resume="allow", config=options
        )

    def log(self, row: dict[str, Any]) -> None:
        """One row at its step."""
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


LOGGERS: dict[LoggerName, Callable[[Path, int, dict[str, Any]], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


def open_logger(name: LoggerName, run: Path, step: int, options: dict[str, Any]) -> Logger:
    """The named logger of a run that goes on after `step`; `options` are shown beside it."""
    try:
        return LOGGERS[name](run, step, options)
    except ImportError:
        raise BasedError(f"{name} is not installed; `pip install 'based[{name}]'`") from None


def _numbers(row: dict[str, Any]) -> dict[str, float | int]:
    return {name: value for name, value in row.items() if name != "step"}
