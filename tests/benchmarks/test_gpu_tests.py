"""The count of the GPU's tests, on tests that need none."""

from pathlib import Path

import pytest

from benchmarks import gpu_tests, rows


def test_outcomes_are_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "ANYWHERE", ("test_good.py",))
    marked = "import pytest\n@pytest.mark.gpu\ndef test_{}(): {}\n"
    text = marked.format("one", "pass") + marked.format("two", "assert False")
    (tmp_path / "test_good.py").write_text("def test_three(): pass\n")
    (tmp_path / "test_bad.py").write_text(text + marked.format("four", "pytest.skip()"))
    # As strict as our own: checked by a plugin that must come before our packages.
    checked = "addopts = --jaxtyping-packages=based,beartype.beartype"
    strict = f"[pytest]\nmarkers = gpu\nfilterwarnings = error\n{checked}\n"
    (tmp_path / "pytest.ini").write_text(strict)
    assert gpu_tests.main(gpu_tests.Options(("test_bad.py",), processes=2)) == 1
    marked_row, anywhere = rows.read_rows("gpu_tests")
    assert marked_row["failed"] == ["test_bad.py::test_two"]
    assert [marked_row[kind] for kind in ("passed", "skipped", "left")] == [1, 1, 0]
    assert [anywhere[kind] for kind in ("passed", "failed", "left")] == [1, [], 0]


def test_a_run_without_a_test_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    with pytest.raises(SystemExit, match="before it ran a test"):
        gpu_tests.main(gpu_tests.Options(("test_bad.py",), processes=2))
