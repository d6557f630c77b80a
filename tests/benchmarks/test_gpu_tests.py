"""The count of the GPU's tests, on tests that need none."""

import os
from pathlib import Path

from benchmarks import gpu_tests, rows


def test_outcomes_are_a_row(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "ANYWHERE", ("test_good.py",))
    marked = "import pytest\n@pytest.mark.gpu\ndef test_{}(): {}\n"
    text = marked.format("one", "pass") + marked.format("two", "assert False")
    (tmp_path / "test_good.py").write_text("def test_three(): pass\n")
    (tmp_path / "test_bad.py").write_text(text + marked.format("four", "pytest.skip()"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    here = Path.cwd()
    try:
        assert gpu_tests.main(gpu_tests.Options(("test_bad.py",), processes=2)) == 1
    finally:
        os.chdir(here)
    marked_row, anywhere = rows.read_rows("gpu_tests")
    assert marked_row["failed"] == ["test_bad.py::test_two"]
    assert [marked_row[kind] for kind in ("passed", "skipped", "left")] == [1, 1, 0]
    assert [anywhere[kind] for kind in ("passed", "failed", "left")] == [1, [], 0]
