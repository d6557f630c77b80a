"""The suite's order, its way of going on, and that every command of it exists."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from benchmarks import suite

TINY = "generation decode --models based-tiny --contexts 16 --tokens 2 --device cpu --batches"
ALL = [command for stage in suite.STAGES.values() for command in stage.commands]


@pytest.mark.parametrize("command", ALL)
def test_every_command_is_one(command: str) -> None:
    name, *rest = command.split()
    options = import_module(f"benchmarks.{name}").Options
    tyro.cli(options, args=rest)


def rows(results: Path) -> list[int]:
    path = results / "generation.jsonl"
    return [json.loads(line)["batch"] for line in path.read_text().splitlines()]


def test_a_suite_goes_on_where_it_was(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("BASED_RESULTS", str(tmp_path))
    monkeypatch.setenv("BASED_COMMIT", "here")
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr(suite, "STAGES", {"tiny": suite.Stage((f"{TINY} 1", f"{TINY} 2"), 2)})
    suite.main(suite.Options(("tiny",), minutes=0))
    assert "run again" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())
    # What compiles leaves no rows behind: there is one of each.
    suite.main(suite.Options(("tiny",)))
    assert rows(tmp_path) == [1, 2]
    before = (tmp_path / "generation.jsonl").read_text()
    suite.main(suite.Options(("tiny",), warm=False))
    assert (tmp_path / "generation.jsonl").read_text() == before
    assert '"commit": "here"' in before


def test_an_unknown_stage_is_one_line() -> None:
    with pytest.raises(SystemExit, match="no stage is named speed; there are kernels"):
        suite.main(suite.Options(("speed",)))
