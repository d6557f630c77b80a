"""Several gloo ranks on this machine: what they compute is what one rank computes."""

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import ranks
import torch
from test_training import CPU, Recorder, assert_bitwise, weights

from based.cli import main
from based.data.prepare import prepare
from based.training import TrainConfig, Trainer
from based.training.checkpoint import Checkpoints
from based.training.learner import Learner
from based.training.metrics import read_metrics
from based.training.parallel import Ranks, join_job

# What each number of ranks trains, and how it differs from the one rank it is held to.
VARIANTS = {
    2: {
        "sharded": {},
        "context": {"context_parallel": 2},
        "documents": {"context_parallel": 2, "separate_documents": True, "micro_batch": 2},
        "bfloat16": {"precision": "bfloat16", "segment": 10},
    },
    4: {
        "rows": {"context_parallel": 2, "recompute": True, "micro_batch": 1},
        "replicas": {"shards": 2},
        "documents": {"context_parallel": 4, "separate_documents": True},
    },
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": "the cat saw the dog " * (1 + i % 4)}) for i in range(200)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepare([folder / "a.jsonl"], folder / "out", 280)
    return TrainConfig(
        data=folder / "out",
        steps=6,
        batch_size=4,
        length=24,
        window=9,
        warmup_steps=2,
        evaluate_every=3,
        evaluate_windows=5,
        checkpoint_every=2,
        keep_checkpoints=5,
    )


def train(config: TrainConfig, folder: Path, fail_after: int | None = None) -> Recorder:
    def interrupt(step) -> None:
        if step.step == fail_after:
            raise InterruptedError

    recorder = Recorder(interrupt)
    Trainer(config, folder, recorder, CPU).train()
    return recorder


def job(config: TrainConfig, folder: Path, variants: dict) -> list[str]:
    join_job("cpu")
    for name, change in variants.items():
        train(replace(config, **change), folder / name)
    # Stopped by a wish that only rank 1 has, and only after a step, it goes on bit for bit.
    recorder = Recorder()
    trainer = Trainer(config, folder / "again", recorder, CPU)
    advance = trainer.advance

    def wishing_advance() -> None:
        advance()
        trainer.stop_requested = trainer.step == 2 and trainer.ranks.rank == 1

    trainer.advance = wishing_advance
    assert trainer.train() is None
    train(config, folder / "again")
    # Another number of ranks goes on from one rank's checkpoint.
    return train(config, folder / "resharded").messages


@pytest.mark.parametrize("size", VARIANTS)
def test_ranks_compute_what_one_rank_computes(config, tmp_path, size) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    train(config, one / "sharded")
    train(replace(config, separate_documents=True), one / "documents")
    with pytest.raises(InterruptedError):
        train(config, many / "resharded", fail_after=5)
    messages = ranks.run(size, job, config, many, VARIANTS[size] | {"whole": {}})
    assert messages[0] == ["going on from the checkpoint of step 4"]
    assert messages[1] == []
    for name in ("again", "resharded", "whole", *VARIANTS[size]):
        alone = one / ("documents" if name == "documents" else "sharded")
        assert_close(alone, many / name, low_precision=name == "bfloat16")
    assert_bitwise(many / "whole", many / "again")
    # And one rank goes on from theirs.
    for step in (4, 6):
        shutil.rmtree(many / "whole" / "checkpoints" / f"step-{step:08d}")
    messages = train(config, many / "whole").messages
    assert messages == ["going on from the checkpoint of step 2"]
    assert_close(one / "sharded", many / "whole")


def assert_close(a: Path, b: Path, low_precision: bool = False) -> None:
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (a, b))
    assert len(first) == len(second) == 8
    for row, other in zip(first, second, strict=True):
        names = {"loss", "loss_all"} & row.keys() if low_precision else row.keys()
        for name in names - {"tokens_per_second"}:
            tolerance = 1e-2 if low_precision else 2e-4
            message = b.name, name, row["step"]
            assert other[name] == pytest.approx(row[name], rel=tolerance), message
    trained, moved = weights(a), weights(b)
    for name, tensor in trained.items():
        assert moved[name].dtype == torch.float32
        if not low_precision:
            torch.testing.assert_close(moved[name], tensor, rtol=1e-3, atol=2e-5)


def alone_in_bfloat16(config: TrainConfig, folder: Path) -> None:
    train(replace(config, precision="bfloat16"), folder)


def test_one_rank_in_bfloat16_keeps_float32_weights(config, tmp_path) -> None:
    train(config, tmp_path / "float32")
    ranks.run(1, alone_in_bfloat16, config, tmp_path / "bfloat16")
    assert_close(tmp_path / "float32", tmp_path / "bfloat16", low_precision=True)


def command(run: Path, data: Path, fault: str) -> None:
    """`based train` on this rank, which breaks on rank 1 in the named way."""
    rank = int(os.environ["RANK"])
    screen = os.open(run.with_name(f"screen{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    if rank == 1:
        BREAK[fault]()
    options = "--batch-size 4 --length 24 --checkpoint-every 2 --warmup-steps 2 --device cpu"
    steps = "100000" if fault in ("killed", "told to end") else "6"
    main(["train", str(run), "--data", str(data), "--steps", steps, *options.split()])


def full_disk() -> None:
    from torch.distributed.checkpoint import FileSystemWriter

    def write_data(self, plan, planner):
        if "step-00000004" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, plan, planner)

    write = FileSystemWriter.write_data
    FileSystemWriter.write_data = write_data


def infinite_loss() -> None:
    def gradients(self, rows):
        total, norm = compute(self, rows)
        return total / (0 if next(steps) == 5 else 1), norm

    compute, steps = Learner.gradients, count(1)
    Learner.gradients = gradients


def corrupt_shard() -> None:
    from based.data import TokenDataset

    TokenDataset.vocab_size = property(lambda self: 3, lambda self, value: None)


BREAK = {
    "killed": lambda: None,
    "told to end": lambda: None,
    "full disk": full_disk,
    "infinite loss": infinite_loss,
    "corrupt shard": corrupt_shard,
}


@pytest.mark.parametrize(
    ("fault", "size", "says", "kept"),
    [
        ("killed", 4, "another rank was lost in step", None),
        ("told to end", 2, "the job was told to end", None),
        ("full disk", 2, "the disk is full", 2),
        ("infinite loss", 2, "the loss is inf", 4),
        ("corrupt shard", 2, "is damaged: it holds token", 0),
    ],
)
def test_a_fault_is_one_line_and_the_last_checkpoint_is_whole(
    config, tmp_path, fault, size, says, kept
) -> None:
    run = tmp_path / "run"
    processes, results = ranks.start(size, command, run, config.data, fault)
    checkpoints = Checkpoints(run / "checkpoints", 2, Ranks(CPU))
    if kept is None:
        while len(checkpoints.steps()) < 2:
            assert all(process.is_alive() for process in processes)
            time.sleep(0.05)
        processes[1].kill() if fault == "killed" else processes[1].terminate()
    began = time.monotonic()
    for process in processes:
        process.join(60)
    if kept is None:
        assert time.monotonic() - began < 20
    assert all(process.exitcode != 0 for process in processes), results.get()
    screens = "".join(path.read_text() for path in tmp_path.glob("screen*.txt"))
    lines = [line for line in screens.splitlines() if line.startswith("based: ")]
    assert len(lines) == 1, screens
    assert says in lines[0]
    assert "Traceback" not in screens
    newest = max(checkpoints.steps(), default=0)
    if fault == "killed":
        assert f"checkpoint of step {newest} is whole" in lines[0]
    assert kept in (None, newest), lines
    assert newest == 0 or checkpoints._damage(newest) is None
