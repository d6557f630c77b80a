import shutil
from pathlib import Path

import pytest

from based.errors import BasedError
from benchmarks import sanitize
from benchmarks.rows import read_rows

SAME_STORE = """========= Error: Race reported between Write access at _kernel+0x10 in decode.py:186
=========     and Write access at _kernel+0x10 in decode.py:186 [57 hazards]
"""
READ_WRITE = """========= Error: Race reported between Write access at _kernel+0x10 in decode.py:186
=========     and Write access at _kernel+0x10 in decode.py:186 [3 hazards]
=========     and Read access at _kernel+0x20 in decode.py:190 [4 hazards]
"""
TWO_STORES = SAME_STORE.replace(
    "and Write access at _kernel+0x10", "and Write access at _kernel+0x18"
)
OUTSIDE = """========= Invalid __global__ read of size 4 bytes
=========     at _kernel+0x30 in decode.py:12
"""


def test_writes_of_one_instruction_are_counted_apart() -> None:
    assert sanitize.complaints(SAME_STORE + SAME_STORE) == ([], 114)


@pytest.mark.parametrize("report", [READ_WRITE, TWO_STORES, OUTSIDE])
def test_everything_else_is_an_error(report: str) -> None:
    errors, same = sanitize.complaints(SAME_STORE + report)
    assert (len(errors), same) == (1, 57)


@pytest.mark.parametrize(("report", "ends"), [("", True), (OUTSIDE, True), ("", False)])
def test_a_row_says_what_a_tool_found(
    report: str, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool that prints `report`, and lets its program run or not."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{report}END\nshift 6\n" + 'exec "$@"\n' * ends)
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tool))
    monkeypatch.setattr("benchmarks.rows.RESULTS", tmp_path)
    options = sanitize.Options(("decoding",), ("racecheck",))
    if report or not ends:
        with pytest.raises(SystemExit):
            sanitize.main(options)
    else:
        sanitize.main(options)
    (row,) = read_rows("sanitize")
    assert row["count"] == bool(report) + (not ends)


def test_what_breaks_under_a_tool_is_watched_unoptimised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    run = 'test -n "$DISABLE_PTXAS_OPT" || { echo "NaN in d_k"; exit 1; }\nshift 6\nexec "$@"\n'
    tool.write_text(f"#!/bin/sh\n{run}")
    tool.chmod(0o755)
    found = sanitize.watch("decoding", "memcheck", str(tool), minutes=5)
    assert (found["count"], found["optimised"]) == (0, False)
    assert found["optimised_ended"] == "NaN in d_k"


def test_what_does_not_end_is_ended(tmp_path: Path) -> None:
    text = sanitize.run_for(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 1 / 60, {})
    assert text == "begun\n"


def test_no_such_part() -> None:
    with pytest.raises(BasedError, match="no part all; parts are hopper,"):
        sanitize.main(sanitize.Options(("all",)))
