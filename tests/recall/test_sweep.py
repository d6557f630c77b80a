"""Sweeps: several points, put aside and gone on with, killed, failed; their picture and table."""

import json
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from based.cli import main
from based.errors import BasedError
from based.files import held
from based.recall import train
from based.recall.config import Point, Recipe
from based.recall.mqar import Task
from based.recall.plot import draw, markdown, table
from based.recall.results import Results, agreement, best_rows, frontier, read_rows
from based.recall.sweep import Job, again_with_other_seeds, sweep, work
from based.recall.workers import local_workers, ray_workers

RECIPE = Recipe(
    vocab_size=16,
    train=(Task(16, 2, 32),),
    test=(Task(16, 2, 16),),
    learning_rates=(1e-3, 1e-2),
    epochs=2,
    batch_size=16,
)
POINTS = [
    Point("based", 16, {"feature_dim": 4}),
    Point("sliding_window", 16, {"window": 4}),
    Point("attention", 16),
]


def at_once(job: Job) -> "Future[list[dict] | None]":
    future: Future[list[dict] | None] = Future()
    future.set_result(work(job, "cpu"))
    return future


def run(results: Results, points=POINTS, **options) -> list[tuple[Point, list[dict] | None]]:
    return list(sweep(points, results, at_once, **options))


def test_a_sweep_trains_what_is_missing(tmp_path: Path) -> None:
    results = Results(tmp_path, RECIPE)
    assert len(run(results, POINTS[:1])) == 1
    assert {point.key for point, _ in run(results)} == {point.key for point in POINTS[1:]}
    assert run(results) == []
    rows = results.rows()
    assert len(rows) == 6
    assert {(row["point"], row["learning_rate"]) for row in rows} == {
        (point.key, rate) for point in POINTS for rate in RECIPE.learning_rates
    }
    assert all(row["status"] == "done" for row in rows)


def test_out_of_time_everything_is_put_aside_and_goes_on(tmp_path: Path) -> None:
    results = Results(tmp_path, RECIPE)
    assert [rows for _, rows in run(results, deadline=0.0)] == [None] * 3
    assert results.rows() == []
    trainer = train.PointTrainer(
        POINTS[2], RECIPE, torch.device("cpu"), results.checkpoint(POINTS[2])
    )
    assert trainer.train(deadline=0.0) is None
    assert results.checkpoint(POINTS[2]).exists()
    submitted: list[Point] = []

    def submit(job: Job) -> "Future[list[dict] | None]":
        submitted.append(job.point)
        return at_once(job)

    list(sweep(POINTS, results, submit))
    # What had begun comes first.
    assert submitted == [POINTS[2], *POINTS[:2]]
    assert len(results.rows()) == 6
    assert not list((tmp_path / "running").iterdir())


def test_half_a_line_counts_as_not_written(tmp_path: Path) -> None:
    results = Results(tmp_path, RECIPE)
    run(results, POINTS[:2])
    content = results.path.read_text()
    results.path.write_text(content[:-40])
    again = Results(tmp_path, RECIPE)
    assert len(again.rows()) == 3
    run(again, POINTS[:2])
    rows = again.rows()
    assert len({(row["point"], row["learning_rate"]) for row in rows}) == len(rows) == 4


def test_another_recipe_needs_another_directory(tmp_path: Path) -> None:
    Results(tmp_path, RECIPE)
    with pytest.raises(BasedError, match="holds results of another recipe"):
        Results(tmp_path, replace(RECIPE, epochs=3))


def test_one_impossible_point_does_not_end_the_sweep(tmp_path: Path) -> None:
    results = Results(tmp_path, RECIPE)
    # rwkv7 has heads of 64 channels.
    run(results, [Point("rwkv7", 16), POINTS[0]])
    rows = results.rows()
    refused = [row for row in rows if row["status"] == "impossible"]
    assert {row["architecture"] for row in refused} == {"rwkv7"}
    assert "head_dim 64 does not divide 16" in refused[0]["reason"]
    assert sum(row["status"] == "done" for row in rows) == 2
    assert {row["architecture"] for row in best_rows(rows)} == {"based"}
    assert run(results, [Point("rwkv7", 16)]) == []


def test_a_failed_point_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path, RECIPE)

    def out_of_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(train, "build_model", out_of_memory)
        run(results, POINTS[:1])
    assert {row["status"] for row in results.rows()} == {"failed"}
    assert results.rows()[0]["reason"] == "OutOfMemoryError: no room"
    run(results, POINTS[:1])
    assert [row["status"] for row in results.rows()[2:]] == ["done", "done"]


def test_processes_side_by_side(tmp_path: Path) -> None:
    results = Results(tmp_path, RECIPE)
    with local_workers(2) as submit:
        list(sweep(POINTS[:2], results, submit, threads=1))
    alone = Results(tmp_path / "alone", RECIPE)
    run(alone, POINTS[:2])
    curves = [
        {(row["point"], row["learning_rate"]): row["curve"] for row in one.rows()}
        for one in (results, alone)
    ]
    assert curves[0] == curves[1]


def test_a_ray_cluster(tmp_path: Path) -> None:
    results = Results(tmp_path, RECIPE)
    with ray_workers("local") as submit:
        list(sweep(POINTS, results, submit, threads=1))
    assert len(results.rows()) == 6


def test_no_ray_cluster_is_one_line() -> None:
    with (
        pytest.raises(BasedError, match="no Ray cluster at '127"),
        ray_workers("127.0.0.1:1"),
    ):
        pass


def row(architecture: str, size: int, accuracy: float, seed: int = 123, **more) -> dict:
    dials = more.pop("dials", {"feature_dim": 16} if architecture == "based" else {})
    point = Point(architecture, 64, dials, seed)
    return {
        "point": point.key,
        "architecture": architecture,
        "hidden_size": 64,
        "dials": dials,
        "seed": seed,
        "status": "done",
        "accuracy": accuracy,
        "learning_rate": 1e-3,
        "state_bytes": size,
        "paper_bytes": size,
        "epochs": 32,
        **more,
    }


def test_frontier_and_other_seeds() -> None:
    rows = [
        row("based", 40_292, 0.91),
        row("based", 40_292, 0.85, learning_rate=1e-2),
        row("gla", 4_608, 0.53),
        row("mamba", 50_000, 0.75),
        row("attention", 524_808, 1.0),
    ]
    edge = frontier(best_rows(rows))
    assert [one["architecture"] for one in edge] == ["gla", "based", "attention"]
    again = again_with_other_seeds(rows, (1, 2))
    assert [(point.architecture, point.seed, rates) for point, rates in again[2:4]] == [
        ("based", 1, (1e-3,)),
        ("based", 2, (1e-3,)),
    ]
    assert again[2][0].dials == {"feature_dim": 16}


def test_agreement_says_what_the_other_sweeps_choice_loses() -> None:
    def rows(*accuracies: float) -> list[dict]:
        pairs = zip((1e-3, 1e-2), accuracies, strict=True)
        return [
            {"point": "a", "learning_rate": rate, "accuracy": reached, "status": "done"}
            for rate, reached in pairs
        ]

    (found,) = agreement(rows(0.7, 0.4), rows(0.5, 0.6))
    assert (found.row["accuracy"], found.other["accuracy"]) == (0.7, 0.6)
    assert found.loss == pytest.approx(0.3)
    assert agreement(rows(0.7, 0.4), [{**row, "point": "b"} for row in rows(0.1, 0.2)]) == []


def test_the_picture_and_the_table(tmp_path: Path) -> None:
    rows = [
        row("based", 40_292, 0.91, paper_bytes=40_548),
        row("based", 40_292, 0.87, 124, paper_bytes=40_548),
        row("mamba", 50_000, 0.75),
        row("shipped", 20_000, 0.6, dials={"feature_dim": 8, "window": 9}, paper_bytes=None),
        {**row("rwkv7", 1, 0.0), "status": "impossible"},
    ]
    paths = draw(rows, tmp_path / "frontier.png")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    svg = paths[1].read_text()
    assert "<svg" in svg
    lines = {line["configuration"]: line for line in table(rows)}
    assert len(lines) == 3
    based = lines["based, d 64, feature_dim 16"]
    assert based["accuracy"] == pytest.approx(0.89)
    assert based["range"] == (0.87, 0.91)
    assert based["published"] == 0.913
    assert based["on_frontier"]
    assert not lines["mamba, d 64"]["on_frontier"]
    (picture, _) = draw(rows, tmp_path / "other.png", beside_published=False)
    assert picture.stat().st_size < paths[0].stat().st_size
    assert "| 2 |  |" in markdown(rows, beside_published=False)
    text = markdown(rows)
    assert (
        "| **based, d 64, feature_dim 16** | 40,292 | 0.890 (0.870 to 0.910) | 2 | 0.913 |" in text
    )


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("based.recall.grids.GRIDS", {"tiny": (lambda r: POINTS, lambda: RECIPE)})
    monkeypatch.setattr("based.recall.workers.local_workers", _here)
    out = str(tmp_path / "out")
    main(["recall", "sweep", "tiny", out, "--minutes", "0"])
    assert "3 points wait: the same command goes on" in capsys.readouterr().out
    main(["recall", "sweep", "tiny", out, "--only", "based"])
    assert "2 results in" in capsys.readouterr().out
    with held(Path(out), "sweeping into"), pytest.raises(SystemExit):
        main(["recall", "sweep", "tiny", out])
    assert f"another process is sweeping into {out}" in capsys.readouterr().err.replace("\n", "")
    main(["recall", "sweep", "tiny", out])
    main(["recall", "sweep", "seeds", out, "--seeds", "7"])
    rows = read_rows(Path(out) / "results.jsonl")
    assert {one["seed"] for one in rows} == {123, 7}
    main(["recall", "plot", out])
    assert (Path(out) / "frontier.svg").exists()
    capsys.readouterr()
    main(["recall", "plot", out, "--against", out])
    shown = capsys.readouterr().out
    count = len({one["point"] for one in rows})
    assert shown.count("+0.000") == count
    assert f"largest difference 0.000, {count} points" in shown
    assert "out chose loses at most 0.000 in out" in shown
    assert "| configuration |" in (Path(out) / "frontier.md").read_text()


def _here(jobs: int, devices: list[str]):
    from contextlib import nullcontext

    return nullcontext(at_once)


def test_run_prints_its_rows(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("based.recall.config.small_recipe", lambda: RECIPE)
    began = time.monotonic()
    point = ["based", "--hidden-size", "16", "--dials", "feature_dim", "4"]
    main(["recall", "run", *point, "--small", "--device", "cpu", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["learning_rate"] for one in rows] == [1e-3, 1e-2]
    assert 0 < sum(one["seconds"] for one in rows) < time.monotonic() - began
    main(["recall", "run", "gla", "--small", "--device", "cpu", "--epochs", "1"])
    shown = capsys.readouterr().out
    assert "epoch  1" in shown
    assert "state 4,608 bytes" in shown.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "lstm"], "no architecture is named 'lstm'"),
        (["run", "based", "--state-bytes", "5"], "no state near 5 bytes"),
        (["plot", "nowhere"], "nowhere has no results"),
        (["sweep", "demo", "here", "--only", "lstm"], "no point of demo begins with lstm"),
        (["sweep", "seeds", "nowhere"], "nowhere is not a sweep's directory"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str], arguments, says
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["recall", *arguments])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
