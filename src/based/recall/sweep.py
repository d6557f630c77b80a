"""A grid of points, several at a time, in pieces that can be stopped and gone on with."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from based.errors import BasedError
from based.recall.config import Point, Recipe
from based.recall.results import Results, Row, best_rows, frontier


@dataclass(frozen=True)
class Job:
    """One point for one worker: at all learning rates that are missing."""

    point: Point
    recipe: Recipe
    folder: Path
    deadline: float
    threads: int | None = None
    fuse: bool = False


Submit = Callable[[Job], "Future[list[Row] | None]"]


def work(job: Job, device: str) -> list[Row] | None:
    """Trains a point; its rows, or None if it was put aside before the deadline."""
    import torch

    from based.recall.train import PointTrainer, describe

    if time.time() > job.deadline:
        return None
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.threads is not None and job.fuse:
        import torch._inductor.config

        # More than its share, for not all compile at once.
        torch._inductor.config.compile_threads = max(2, job.threads)
    where = torch.device(device)
    if where.index is not None:
        torch.cuda.set_device(where)
    try:
        trainer = PointTrainer(job.point, job.recipe, where, job.folder, job.fuse)
        return trainer.train(job.deadline)
    except BasedError as error:
        status, reason = "impossible", str(error)
    except RuntimeError as error:
        # Out of memory among others: one point's failure is not the sweep's.
        status, reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    common = {**describe(job.point, job.recipe), "status": status, "reason": reason}
    return [{**common, "learning_rate": rate} for rate in job.recipe.learning_rates]


def sweep(
    points: Sequence[Point],
    results: Results,
    submit: Submit,
    *,
    deadline: float = float("inf"),
    threads: int | None = None,
    fuse: bool = False,
    rates: Mapping[str, tuple[float, ...]] | None = None,
) -> Iterator[tuple[Point, list[Row] | None]]:
    """Trains what has no result yet; yields every point that ended or was put aside.

    Rows are on the disk before they are yielded. Points that were put aside come
    first, then the others in their order. `rates` gives points, by key, other
    learning rates than the recipe's; `fuse` is `PointTrainer`'s.
    """
    wanted = {point.key: results.recipe.learning_rates for point in points} | dict(rates or {})
    todo = [
        (point, missing)
        for point in points
        if (missing := results.missing(point, wanted[point.key]))
    ]
    todo.sort(key=lambda pair: not results.checkpoint(pair[0]).exists())
    futures: dict[Future[list[Row] | None], Point] = {}
    for point, missing in todo:
        recipe = replace(results.recipe, learning_rates=missing)
        folder = results.checkpoint(point)
        futures[submit(Job(point, recipe, folder, deadline, threads, fuse))] = point
    try:
        for future in as_completed(futures):
            point, rows = futures[future], future.result()
            if rows is not None:
                results.append(rows)
                shutil.rmtree(results.checkpoint(point), ignore_errors=True)
            yield point, rows
    except BrokenProcessPool as error:
        raise BasedError(
            "a worker process died (out of memory?); finished points are kept: "
            "run the same command to go on, with fewer --jobs"
        ) from error


def again_with_other_seeds(
    rows: Sequence[Row], seeds: Sequence[int]
) -> list[tuple[Point, tuple[float, ...]]]:
    """Frontier points, at their best learning rate alone, with other seeds."""
    first = best_rows(row for row in rows if row["seed"] not in seeds)
    return [
        (
            Point(row["architecture"], row["hidden_size"], row["dials"], seed),
            (row["learning_rate"],),
        )
        for row in frontier(first)
        for seed in seeds
    ]
