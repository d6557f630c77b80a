import errno
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import ranks
import torch
from torch import nn

from based import files
from based.data.prepare import prepare
from based.errors import BasedError
from based.mixers.mamba import Mamba
from based.models import load_model
from based.models.checkpoint import model_folder
from based.training import TrainConfig, Trainer, checkpoint
from based.training.learner import Learner
from based.training.metrics import MetricsLog, plot_metrics, read_metrics, smoothed
from based.training.optimizer import build_optimizer, learning_rate

CPU = torch.device("cpu")


class Recorder:
    """A reporter that remembers, and may interfere after a step."""

    def __init__(self, after_step=lambda step: None) -> None:
        self.steps, self.evaluations, self.messages = [], [], []
        self._after_step = after_step

    def on_step(self, step) -> None:
        self.steps.append(step)
        self._after_step(step)

    def on_evaluation(self, step, result) -> None:
        self.evaluations.append((step, result))

    def on_message(self, text) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("the cat sat on the mat, and the dog saw the cat. " * 200)
    prepare([folder / "a.txt"], folder / "out", 280)
    return folder / "out"


@pytest.fixture
def config(data) -> TrainConfig:
    return TrainConfig(
        data=data,
        steps=12,
        batch_size=4,
        micro_batch=2,
        length=16,
        warmup_steps=3,
        evaluate_every=6,
        checkpoint_every=4,
    )


def train(config, folder, recorder=None) -> Recorder:
    recorder = recorder or Recorder()
    Trainer(config, folder, recorder, CPU).train()
    return recorder


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(folder / "model").state_dict()


def assert_bitwise(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert numbers(a) == numbers(b)


def numbers(folder: Path) -> list[dict]:
    """The rows of the metrics, without what the clock says."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def test_a_run_learns_and_leaves_all_it_promises(config, tmp_path) -> None:
    recorder = train(replace(config, steps=60), tmp_path / "run")
    losses = [step.loss for step in recorder.steps]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert recorder.evaluations[-1][0] == 60
    assert recorder.evaluations[-1][1].perplexity() < 30
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000056",
        "step-00000060",
    ]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 60 + 10


def test_resumed_is_never_interrupted_bit_for_bit(config, tmp_path) -> None:
    train(config, tmp_path / "whole")
    for stop_after in (5, 9):  # between checkpoints: steps 5 and 9 are lost and done anew

        def fail(step, stop_after=stop_after) -> None:
            if step.step == stop_after:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            train(config, tmp_path / "cut", Recorder(fail))
    recorder = train(config, tmp_path / "cut")
    assert recorder.messages == ["going on from the checkpoint of step 8"]
    assert_bitwise(tmp_path / "whole", tmp_path / "cut")


def test_numbers_may_come_a_step_late(config, tmp_path) -> None:
    train(config, tmp_path / "at once")
    recorder, seen = Recorder(), []
    trainer = Trainer(config, tmp_path / "late", recorder, CPU)
    trainer.lag = 1
    recorder._after_step = lambda step: seen.append(trainer.step - step.step)
    trainer.train()
    # The last before an evaluation or a checkpoint is waited for.
    assert seen == [1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0]
    assert_bitwise(tmp_path / "at once", tmp_path / "late")


def killed(config: TrainConfig, folder: Path, where: str) -> None:
    """A run in a process of its own that kills itself at the named moment."""
    calls, sync, files_of = count(1), files._sync_one, checkpoint._files

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killing_sync(path: Path) -> None:
        if where == "while syncing" and next(calls) == 9:
            kill()
        sync(path)

    def killing_files(folder: Path) -> dict:
        if where == "before the manifest" and "00000008" in str(folder):
            kill()
        return files_of(folder)

    def killing_step(step) -> None:
        if where == "in a step" and step.step == 7:
            kill()

    torch.set_num_threads(1)
    files._sync_one, checkpoint._files = killing_sync, killing_files
    train(config, folder, Recorder(killing_step))


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(config, tmp_path) -> None:
    def run(folder: Path, where: str) -> int | None:
        process = ranks.CONTEXT.Process(target=killed, args=(config, folder, where))
        process.start()
        process.join()
        return process.exitcode

    for where in ("in a step", "before the manifest", "while syncing"):
        assert run(tmp_path / "killed", where) == -signal.SIGKILL, where
    assert run(tmp_path / "killed", "nowhere") == 0
    assert run(tmp_path / "whole", "nowhere") == 0
    assert_bitwise(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


def damage(path: Path) -> None:
    shard = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(config, tmp_path) -> None:
    run = tmp_path / "run"
    train(config, run)
    damage(run / "checkpoints" / "step-00000012")
    recorder = train(config, run)
    assert "step 12 is damaged" in recorder.messages[0]
    assert "going on from the checkpoint of step 8" in recorder.messages[1]
    damage(run / "checkpoints" / "step-00000012")
    (run / "checkpoints" / "step-00000008" / "manifest.json").unlink()
    with pytest.raises(BasedError, match=r"all checkpoints in .* are damaged"):
        train(config, run)


def test_a_full_disk_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch) -> None:
    run, sync = tmp_path / "run", files._sync_one

    def full(path: Path) -> None:
        if any("step-00000008" in part for part in path.parts):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(files, "_sync_one", full)
    with pytest.raises(BasedError, match="the disk is full; what was there is kept"):
        train(config, run)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    assert train(config, run).messages == ["going on from the checkpoint of step 4"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_one_line_where_metrics_are_written_too(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(BasedError, match=r"could not save .*metrics.jsonl: the disk is full"):
        MetricsLog(tmp_path / "metrics.jsonl").append(step=1, loss=2.0)


@pytest.mark.parametrize("lag", [0, 1])
def test_nothing_of_a_step_of_infinite_loss_is_saved(config, tmp_path, monkeypatch, lag) -> None:
    run, config = tmp_path / "run", replace(config, evaluate_every=100)

    def poison(step) -> None:
        # The step before a checkpoint's, or the one that is computed by then.
        if step.step == 7 - lag:
            monkeypatch.setattr(
                Learner, "_backward", lambda *args, **_: backward(*args, **_) * math.nan
            )

    backward = Learner._backward
    trainer = Trainer(config, run, Recorder(poison), CPU)
    trainer.lag = lag
    with pytest.raises(BasedError, match=r"loss is nan .* at step 8.*of step 4 is kept"):
        trainer.train()
    monkeypatch.undo()
    recorder = train(config, run)
    assert recorder.messages == ["going on from the checkpoint of step 4"]
    assert all(math.isfinite(step.loss) for step in recorder.steps)


def test_asked_to_stop_it_saves_and_stops(config, tmp_path) -> None:
    recorder = Recorder()
    trainer = Trainer(config, tmp_path / "run", recorder, CPU)
    recorder._after_step = lambda step: setattr(trainer, "stop_requested", step.step == 3)
    assert trainer.train() is None
    assert "stopped after step 4" in recorder.messages[-1]
    with pytest.raises(BasedError, match="has not finished"):
        model_folder(tmp_path / "run")
    assert train(config, tmp_path / "run").messages == ["going on from the checkpoint of step 4"]


def test_other_options_or_a_second_process_are_refused(config, tmp_path) -> None:
    def another(step) -> None:
        with pytest.raises(BasedError, match="another process is training"):
            train(config, tmp_path / "run")

    train(replace(config, steps=2), tmp_path / "run", Recorder(another))
    with pytest.raises(BasedError, match=r"begun with steps 2, not 12"):
        train(config, tmp_path / "run")
    train(replace(config, steps=2, checkpoint_every=5), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
    ],
)
def test_bad_options(config, change, says) -> None:
    with pytest.raises(BasedError, match=says):
        replace(config, **change)


def test_bad_runs(config, tmp_path) -> None:
    for change, says in (
        ({"length": 10**6}, "use more text or a shorter sequence length"),
        ({"preset": "based-huge"}, "no preset is named"),
        ({"window": 0}, "window is 0"),
        ({"data": tmp_path}, "no token shards"),
    ):
        with pytest.raises(BasedError, match=says):
            Trainer(replace(config, **change), tmp_path / "run", Recorder(), CPU)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize(
    "change", [{"micro_batch": 1}, {"segment": 5}, {"segment": 7, "recompute": True}]
)
def test_savings_of_memory_leave_the_gradient_alone(config, tmp_path, change) -> None:
    found = []
    for options in ({"micro_batch": 4}, change):
        trainer = Trainer(replace(config, **options), tmp_path, Recorder(), CPU)
        loss, norm = trainer.learner.gradients(trainer.loader.rows(0))
        found.append([loss, norm, *(p.grad for p in trainer.model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_only_matrices_decay_and_the_rate_is_warm_up_then_cosine(config) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    decayed, others = build_optimizer(model, config).param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    mamba = Mamba(4, 8)
    decayed, others = build_optimizer(mamba, config).param_groups
    assert {id(p) for p in others["params"]} >= {id(mamba.A_log), id(mamba.D), id(mamba.dt_bias)}
    assert any(p is mamba.dt_weight for p in decayed["params"])
    config = replace(config, steps=1000, warmup_steps=100)
    rates = [learning_rate(config, step) / config.learning_rate for step in range(1001)]
    assert rates[100] == max(rates) == 1
    assert rates[0] == pytest.approx(1 / 101)
    assert rates[550] == pytest.approx(0.55)
    assert rates[1000] == pytest.approx(0.1)


def test_metrics_survive_a_torn_line(tmp_path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in range(1, 5):
        log.append(step=step, tokens=step, loss=float(step))
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    log.keep_until(3)
    log.append(step=4, tokens=4, loss=0.0)
    assert [json.loads(line)["loss"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 0]
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    plot_metrics(log.rows(), tmp_path / "m.png", "title")
    assert (tmp_path / "m.png").exists()
