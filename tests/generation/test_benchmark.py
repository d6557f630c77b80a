"""`python -m benchmarks.generation` at sizes for a CPU."""

import sys

import pytest

from based.errors import BasedError
from based.ops import kernels
from based.ops.few_rows_linear import projections, residual
from benchmarks import floors, generation, rows, tables
from benchmarks.floors import RECENT
from benchmarks.generation_plot import usual_rounds


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.generation_plot.RESULTS", tmp_path)

    def run(*arguments: str) -> list[dict]:
        command = ["generation", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        generation.main()
        return rows.read_rows("generation")

    return run


def test_decode_at_a_context_resumes_and_is_drawn(bench, monkeypatch) -> None:
    command = ["decode", "--models", "based-tiny", "attn-tiny", "--batches", "1", "4"]
    command += ["--contexts", "1024", "--tokens", "3"]
    got = bench(*command)
    assert [(row["model"], row["batch"]) for row in got] == [
        (model, batch) for model in ("based-tiny", "attn-tiny") for batch in (1, 4)
    ]
    for row in got:
        assert row["tokens_per_second"] == pytest.approx(1000 * row["batch"] / row["ms_per_step"])
        assert 0 < row["floor_ms"] < row["ms_per_step"]
    # What is there at this commit is not measured again.
    monkeypatch.setattr(generation, "build", None)
    assert bench(*command) == got
    path = generation.draw()
    assert path.stat().st_size > 10_000


def test_each_device_has_a_table_of_its_own(bench, monkeypatch) -> None:
    command = ["decode", "--models", "based-tiny", "--batches", "1"]
    command += ["--contexts", "1024", "--tokens", "2"]
    for device in ("an older GPU", "a GPU"):
        monkeypatch.setattr(rows, "device_name", lambda device=device: device)
        bench(*command)
    # Rows of other pieces, of whatever device, change none of them.
    monkeypatch.setattr(rows, "device_name", lambda: "a CPU")
    rows.add_row("generation", {"piece": "state", "recent": 32}, {"errors": [0.1]})
    assert "a CPU" not in tables.generation() + tables.other_devices()
    assert [row["device"] for row in usual_rounds()] == ["a GPU"]
    assert [row["device"] for row in usual_rounds("an older GPU")] == ["an older GPU"]
    for table, device in ((tables.generation, "a GPU"), (tables.other_devices, "an older GPU")):
        assert f"\n\n{device}, torch" in table()


def test_ablations_and_profiles_are_rows_of_their_own(bench, monkeypatch) -> None:
    monkeypatch.setattr(generation, "profiled", lambda call, calls: call() or {"other": 1.0})
    for name in ("OVERLAP", "INTERPRETING"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name))
    monkeypatch.setattr(projections, "MOST_ROWS", 4)
    monkeypatch.setattr(residual, "MOST_ROWS_IN_TILES", 128)
    common = ("--models", "based-tiny", "--batches", "1", "--contexts", "20", "--tokens", "2")
    bench("profile", *common)
    got = bench("profile", *common, "--no-overlap", "--no-fused", "--recent", "0")
    assert [row["fused"] for row in got] == [True, False]
    assert got[1]["ms"] == {"other": 1.0}
    assert (kernels.OVERLAP, projections.MOST_ROWS) == (False, 0)
    assert residual.MOST_ROWS_IN_TILES == 0


def test_whole_requests_and_real_prompts(bench, monkeypatch) -> None:
    common = ("--models", "based-tiny", "--batches", "2", "--tokens", "5")
    (row,) = bench("generate", *common, "--prompt", "9")
    assert row["tokens_per_second"] == pytest.approx(2 * 5 / row["seconds"])
    monkeypatch.setattr(generation, "QUEUED", (6, 13))
    row = bench("queue", *common[:4], "--prompt", "9")[-1]
    assert row["requests"] == 8
    assert row["tokens_per_second"] >= 8 * 6 / row["seconds"]
    assert "| 8 x 9 + 6 to 12 |" in tables.whole_requests()
    row = bench("first", *common[:4], "--contexts", "20")[-1]
    assert 0 < row["ms"] <= row["slowest_ms"]
    assert "| model | 2 x 20 |" in tables.first_token()
    row = bench("prompt", *common, "--contexts", "50")[-1]
    assert (row["piece"], row["context"]) == ("prompt", 50)


def test_hugging_face_at_our_sizes(bench) -> None:
    row = bench(
        "huggingface", "--models", "attn-tiny", "--batches", "2", "--tokens", "4", "--prompt", "5"
    )[-1]
    assert (row["attention"], row["model"]) == ("sdpa", "attn-tiny")
    assert row["tokens_per_second"] > 0


def test_kernels_and_state(bench, monkeypatch) -> None:
    monkeypatch.setattr(floors, "HEAD_DIMS", (64,))
    monkeypatch.setattr(floors, "median_device_seconds", lambda call, device: call() is not None)
    monkeypatch.setattr(floors, "HEADS", 2)
    got = bench("kernels", "--batches", "1")
    assert [row["kernel"] for row in got] == [*floors.KERNELS, *floors.ONE_ROW]
    # A float32 state of 153 x 64 and its normaliser, read and written, of two heads.
    assert got[0]["bytes"] == 2 * 2 * 153 * 65 * 4
    got = bench("state", "--contexts", "100")[-5:]
    kept = {(stored, recent) for stored in ("float32", "bfloat16") for recent in (0, RECENT)}
    assert {(row["stored"], row["recent"]) for row in got} == kept | {("halves", RECENT)}


def test_absent_peers_say_what_they_need(bench, tmp_path) -> None:
    with pytest.raises(BasedError, match="needs mamba-ssm"):
        bench("mamba", "--batches", "1")
    with pytest.raises(BasedError, match="is no checkout of the official repository"):
        bench("official", "--batches", "1", "--repository", str(tmp_path))
