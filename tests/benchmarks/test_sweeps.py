"""The lab's sweeps in order: where results go, what a call took, and going on."""

import json
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import pytest

from based.recall.command import Sweep
from based.recall.config import Point, Recipe
from based.recall.grids import named_grid
from based.recall.mqar import Task
from based.recall.sweep import Job, work
from benchmarks import rows, sweeps

TINY = Recipe(
    vocab_size=16,
    train=(Task(16, 2, 16),),
    test=(Task(16, 2, 8),),
    learning_rates=(1e-2,),
    epochs=1,
    batch_size=16,
)


def _here(jobs: int, devices: list[str]):
    def at_once(job: Job) -> "Future[list[dict] | None]":
        future: Future[list[dict] | None] = Future()
        future.set_result(work(job, "cpu"))
        return future

    return nullcontext(at_once)


def test_the_six_points_are_six() -> None:
    keys = [point.key for point in named_grid("core")[0]]
    assert sum(key.startswith(sweeps.SIX) for key in keys) == 6


def test_every_sweep_leaves_rows_a_picture_and_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def points(recipe: Recipe) -> list[Point]:
        return [Point("based", 16, {"feature_dim": 4}), Point("attention", 16)]

    grids = dict.fromkeys(("core", "combination", "feature-maps"), (points, lambda: TINY))
    monkeypatch.setattr("based.recall.grids.GRIDS", grids)
    monkeypatch.setattr(sweeps, "SIX", ("based-d16",))
    monkeypatch.setattr("based.recall.workers.local_workers", _here)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    sweeps.main(sweeps.Options(("core",), minutes=0))
    assert not list(tmp_path.iterdir())
    options = sweeps.Options(jobs=1)
    sweeps.main(options)
    found = {path.parent.name: path for path in tmp_path.glob("recall/*/results.jsonl")}
    counts = {name: len(path.read_text().splitlines()) for name, path in found.items()}
    # Two seeds more of the two points on the frontier, or of the one that beats the other.
    assert counts.pop("core") in (4, 6)
    assert counts == {"exact": 1, "combination": 2, "feature-maps": 2}
    recipes = {
        name: json.loads((path.parent / "recipe.json").read_text()) for name, path in found.items()
    }
    assert {name for name, recipe in recipes.items() if recipe["products"] == "float32"} == {
        "exact"
    }
    assert not recipes["exact"]["drop_hopeless"]
    assert all((path.parent / "frontier.png").exists() for path in found.values())
    took = rows.read_rows("sweeps")
    assert [row["sweep"] for row in took] == list(options.sweeps)
    sweeps.main(options)
    assert rows.read_rows("sweeps") == took


def test_a_call_that_is_interrupted_says_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(sweep: Sweep) -> None:
        sweep.out.mkdir(parents=True)
        (sweep.out / "results.jsonl").write_text("{}\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(sweeps, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweeps.main(sweeps.Options(("core",)))
    (took,) = rows.read_rows("sweeps")
    assert (took["sweep"], took["first"], took["last"]) == ("core", 0, 1)
    assert took["seconds"] >= 0
