"""`based recall`: the tradeoff between recall and the size of the state, measured."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from based.errors import BasedError
from based.files import held

if TYPE_CHECKING:
    from rich.console import Console

    from based.recall.config import Point, Recipe
    from based.recall.results import Results, Row
    from based.recall.sweep import Submit


@dataclass(frozen=True)
class Run:
    """Train one configuration at all its learning rates, to the published recipe."""

    architecture: Annotated[str, tyro.conf.Positional]
    """attention, sliding_window, based, mamba, ...; a wrong name lists them all."""
    hidden_size: int = 64
    """Width of the model."""
    dials: dict[str, int] = field(default_factory=dict)
    """Its dials, as in --dials feature_dim 16."""
    state_bytes: int | None = None
    """Choose the one dial so that the state has this size."""
    seed: int = 123
    """Seed of the weights."""
    small: bool = False
    """The reduced task of the demo, for a CPU."""
    epochs: int | None = None
    """Other than the recipe's."""
    learning_rates: tuple[float, ...] | None = None
    """Other than the recipe's."""
    products: Literal["float32", "tf32", "bf16"] = "float32"
    """Arithmetic of matrix products; tf32 leaves the Mambas, which it changes, in float32."""
    device: str = "auto"
    """cpu, cuda, ...; auto is a GPU if there is one."""
    json: bool = False
    """Print the result rows as JSON lines."""


@dataclass(frozen=True)
class Sweep:
    """Train a grid, several points at a time; the same command goes on where it stopped."""

    grid: Annotated[str, tyro.conf.Positional]
    """core, combination, feature-maps or demo; `seeds` repeats OUT's frontier with other seeds."""
    out: Annotated[Path, tyro.conf.Positional]
    """Directory of the results."""
    minutes: float | None = None
    """Put everything aside after this time."""
    jobs: int | None = None
    """Points side by side; by default enough to fill the GPUs or the cores."""
    products: Literal["float32", "tf32", "bf16"] = "float32"
    """Arithmetic of matrix products; tf32 leaves the Mambas, which it changes, in float32."""
    drop_hopeless: bool = False
    """End learning rates early that cannot win any more."""
    fuse: bool = False
    """On a GPU, compile training steps where what is left of a point repays it."""
    seeds: tuple[int, ...] = (124, 125)
    """Other seeds of the grid `seeds`."""
    only: tuple[str, ...] = ()
    """Points whose name begins with one of these texts."""
    ray: str | None = None
    """Run on the Ray cluster at this address (auto, local, host:port)."""
    device: str = "auto"
    """cpu, cuda, ...; auto is every GPU if there is one."""


@dataclass(frozen=True)
class Plot:
    """Draw a sweep's frontier (PNG and SVG) and write its table."""

    out: Annotated[Path, tyro.conf.Positional]
    """Directory of a sweep."""
    against: Path | None = None
    """Compare with another sweep's results, say in other arithmetic, instead."""


@dataclass(frozen=True)
class Demo:
    """A reduced frontier of Based, windows, Mamba and attention: minutes on two cores."""

    out: Path = Path("recall-output")
    """Directory of results and picture."""
    jobs: int | None = None
    """Points side by side; by default one a core."""


@dataclass(frozen=True)
class Capacity:
    """A hand-built Based against the lower bound on its state, and Taylor against softmax."""

    feature_dim: int = 8
    """Size of a key."""
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    """How many pairs to store."""
    trials: int = 20
    """Random tasks for each."""


Recall = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Capacity, tyro.conf.subcommand("capacity")]
)


def run(options: Run | Sweep | Plot | Demo | Capacity) -> None:
    """Runs one of the five."""
    from rich.console import Console

    console = Console()
    match options:
        case Run():
            _run(options, console)
        case Sweep():
            _sweep(options, console)
        case Plot(out, against):
            _plot(out, console) if against is None else _compare(out, against, console)
        case Demo():
            _demo(options, console)
        case Capacity():
            from based.recall.theory import report

            report(options.feature_dim, options.pairs, options.trials, console)


def _run(options: Run, console: Console) -> None:
    from rich.progress import Progress

    from based.models.device import pick_device
    from based.recall.config import Point, Recipe, small_recipe
    from based.recall.grids import point_of_size
    from based.recall.train import PointTrainer

    recipe = replace(small_recipe() if options.small else Recipe(), products=options.products)
    recipe = replace(
        recipe,
        epochs=options.epochs or recipe.epochs,
        learning_rates=options.learning_rates or recipe.learning_rates,
    )
    point = Point(options.architecture, options.hidden_size, options.dials, options.seed)
    if options.state_bytes is not None:
        point = point_of_size(
            point.architecture, point.hidden_size, options.state_bytes, recipe, point.seed
        )
    trainer = PointTrainer(point, recipe, pick_device(options.device))
    with Progress(console=console, transient=True, disable=options.json) as progress:
        task = progress.add_task(point.key, total=recipe.epochs)

        def on_epoch(epoch: int, accuracies: dict[float, float]) -> None:
            shown = "  ".join(f"{rate:.2g}: {value:.3f}" for rate, value in accuracies.items())
            progress.update(task, completed=epoch)
            if not options.json:
                progress.console.print(f"epoch {epoch:>2}  accuracy at {shown}", highlight=False)

        rows = trainer.train(on_epoch=on_epoch) or []
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        for row in rows:
            console.print(_describe(row), highlight=False)


def _sweep(options: Sweep, console: Console) -> None:
    from based.recall.grids import named_grid
    from based.recall.results import Results
    from based.recall.sweep import again_with_other_seeds

    if options.grid == "seeds":
        points, recipe = [], _recipe_of(options.out)
    else:
        points, recipe = named_grid(options.grid)
        recipe = replace(recipe, products=options.products, drop_hopeless=options.drop_hopeless)
    options.out.mkdir(parents=True, exist_ok=True)
    # Before it is opened, which cuts a line that is half written.
    with held(options.out, "sweeping into"):
        results, rates = Results(options.out, recipe), {}
        if options.grid == "seeds":
            again = again_with_other_seeds(results.rows(), options.seeds)
            if not again:
                raise BasedError(f"{options.out} has no results yet; sweep a grid there first")
            points, rates = [point for point, _ in again], {point.key: own for point, own in again}
        if options.only:
            points = [point for point in points if point.key.startswith(options.only)]
        if not points:
            raise BasedError(f"no point of {options.grid} begins with {' or '.join(options.only)}")
        _train(options, points, results, rates, console)


def _recipe_of(out: Path) -> Recipe:
    """The recipe that a sweep's directory was begun with."""
    from based.recall.config import recipe_from_dict

    path = out / "recipe.json"
    if not path.exists():
        raise BasedError(f"{out} is not a sweep's directory; sweep a grid there first")
    return recipe_from_dict(json.loads(path.read_text()))


def _train(
    options: Sweep,
    points: list[Point],
    results: Results,
    rates: dict[str, tuple[float, ...]],
    console: Console,
) -> None:
    from rich.progress import Progress

    from based.recall.sweep import sweep
    from based.recall.workers import cores, default_jobs, local_devices

    devices = local_devices(options.device)
    jobs = options.jobs or default_jobs(devices)
    minutes, began, aside = options.minutes, time.monotonic(), 0
    deadline = float("inf") if minutes is None else time.time() + 60 * minutes
    where = f"on the Ray cluster {options.ray}"
    if options.ray is None:
        where = f"{jobs} at a time on {', '.join(devices)}"
    console.print(f"points: {len(points)}, {where}", highlight=False)
    with (
        _workers(options, jobs, devices) as submit,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task("points", total=len(points))
        ended = sweep(
            *(points, results, submit),
            deadline=deadline,
            # On a CPU always one, so that results do not depend on how many run.
            threads=1 if devices == ["cpu"] else max(1, cores() // jobs),
            fuse=options.fuse,
            rates=rates,
        )
        for _, rows in ended:
            aside += rows is None
            if rows is not None:
                progress.advance(task)
                progress.console.print(_describe(_winner(rows)), highlight=False)
    taken = (time.monotonic() - began) / 60
    console.print(f"{len(results.rows())} results in {results.path}, {taken:.1f} minutes")
    if aside:
        console.print(f"{aside} points wait: the same command goes on")


def _workers(options: Sweep, jobs: int, devices: list[str]) -> AbstractContextManager[Submit]:
    """How jobs are submitted."""
    from based.recall import workers

    if options.ray is None:
        return workers.local_workers(jobs, devices)
    # Ray shows a worker its own GPU alone.
    return workers.ray_workers(options.ray, devices[0].split(":")[0])


def _winner(rows: list[Row]) -> Row:
    return max(rows, key=lambda row: row.get("accuracy", -1.0))


def _describe(row: Row) -> str:
    if "reason" in row:
        return f"{row['point']}: {row['status']}: {row['reason']}"
    return (
        f"{row['point']}: accuracy {row['accuracy']:.3f} at learning rate "
        f"{row['learning_rate']:.2g} ({row['status']} after {row['epochs']} epochs), "
        f"state {row['state_bytes']:,} bytes, {row['seconds']:.0f} s"
    )


def _plot(out: Path, console: Console) -> None:
    from based.recall.plot import draw, markdown

    rows = _rows_of(out)
    beside = _recipe_of(out).is_published_task
    paths = draw(rows, out / "frontier.png", beside)
    (out / "frontier.md").write_text(markdown(rows, beside))
    console.print(f"wrote {', '.join(str(path) for path in paths)} and {out / 'frontier.md'}")


def _compare(out: Path, against: Path, console: Console) -> None:
    from rich.table import Column, Table

    from based.recall.results import agreement

    found = agreement(_rows_of(out), _rows_of(against))
    if not found:
        raise BasedError(f"{out} and {against} have no point in common")
    names = out.resolve().name, against.resolve().name
    point, one, two = (Column(text, no_wrap=True) for text in ("point", *names))
    shown = Table(point, one, two, "differ", "its rate loses")
    for row, other, loss in found:
        shown.add_row(
            row["point"],
            *(f"{one['accuracy']:.3f}" for one in (row, other)),
            f"{row['accuracy'] - other['accuracy']:+.3f}",
            f"{loss:.3f}",
        )
    console.print(shown)
    largest = max(abs(row["accuracy"] - other["accuracy"]) for row, other, _ in found)
    console.print(
        f"largest difference {largest:.3f}, {len(found)} points; the learning rate that "
        f"{names[1]} chose loses at most {max(loss for *_, loss in found):.3f} in {names[0]}",
        soft_wrap=True,
    )


def _rows_of(out: Path) -> list[Row]:
    """A sweep's rows, at least one."""
    from based.recall.results import read_rows

    rows = read_rows(out / "results.jsonl")
    if not rows:
        raise BasedError(f"{out} has no results; sweep a grid there first")
    return rows


def _demo(options: Demo, console: Console) -> None:
    from rich.table import Table

    from based.recall.plot import table

    console.print(
        "[bold]Associative recall[/]: key-value pairs, then each key again; what was its value?\n"
        "4 to 16 pairs in 32 to 64 tokens. Guessing scores 2 %."
    )
    _sweep(Sweep("demo", options.out, jobs=options.jobs, device="cpu"), console)
    rows = _rows_of(options.out)
    shown = Table("configuration", "state, bytes", "recalled", "")
    for line in table(rows):
        mark = "frontier" if line["on_frontier"] else ""
        shown.add_row(
            line["configuration"], f"{line['state_bytes']:,}", f"{line['accuracy']:.1%}", mark
        )
    console.print(shown)
    console.print(
        "One learning rate and six epochs: Mamba and the largest tasks want the whole recipe."
    )
    _plot(options.out, console)
