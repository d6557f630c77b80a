"""Live progress of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from based.evaluation import Perplexity
from based.models.command import human
from based.training.metrics import smoothed
from based.training.reports import Step

# Without a terminal, this many lines a run.
LINES = 20


class TrainingProgress:
    """A `Reporter` that shows loss, tokens a second, use of the GPU and the time left."""

    def __init__(self, console: Console, steps: int, name: str = "training") -> None:
        self._console, self._steps = console, steps
        self._losses: list[float] = []
        self._seconds = 0.0
        self._tokens_before = 0
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        live = console.is_terminal
        self._progress = Progress(*columns, console=console, disable=not live)
        self._task = self._progress.add_task(name, total=steps, numbers="")
        self._live, self._name = live, name

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def on_step(self, step: Step) -> None:
        """Moves the bar."""
        self._losses = [*self._losses[-200:], step.loss]
        loss = smoothed(self._losses)[-1]
        numbers = f"loss {loss:.3f}  {step.tokens_per_second:,.0f} tokens/s"
        if step.peak_share is not None:
            numbers += f"  {step.peak_share:.0%} of peak"
        if step.memory_bytes is not None:
            numbers += f"  {human(step.memory_bytes)}"
        self._progress.update(self._task, completed=step.step, numbers=numbers)
        every = max(1, self._steps // LINES)
        if not self._live and (step.step % every == 0 or step.step == self._steps):
            left = (self._steps - step.step) * step.tokens / step.step / step.tokens_per_second
            self._console.print(
                f"{self._name} {step.step}/{self._steps}  {numbers}  {left:.0f} s left"
            )

    def on_evaluation(self, step: int, result: Perplexity) -> None:
        """One line."""
        self._console.print(
            f"step {step}: held-out perplexity {result.perplexity():.2f}, recall hits "
            f"{result.perplexity('hits'):.2f}, the rest {result.perplexity('rest'):.2f}"
        )

    def on_message(self, text: str) -> None:
        """One line."""
        self._console.print(text)
