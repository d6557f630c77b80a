"""Several gloo ranks on this machine: what they compute is what one rank computes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from test_training import CPU, Recorder, assert_bitwise, weights

from based.data.prepare import prepare
from based.training import TrainConfig, Trainer
from based.training.metrics import read_metrics
from based.training.parallel import join_job

# What each number of ranks trains, and how it differs from the one rank it is held to.
VARIANTS = {
    2: {
        "sharded": {},
        "context": {"context_parallel": 2},
        "documents": {"context_parallel": 2, "separate_documents": True, "micro_batch": 2},
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
    # Stopped by its own wish, which only rank 1 has, it goes on bit for bit.
    recorder = Recorder()
    trainer = Trainer(config, folder / "again", recorder, CPU)
    advance = trainer.advance
    trainer.advance = lambda: (setattr(trainer, "stop_requested", wish()), advance())[1]

    def wish() -> bool:
        return trainer.step == 2 and trainer.ranks.rank == 1

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
        assert_close(alone, many / name)
    assert_bitwise(many / "whole", many / "again")
    # And one rank goes on from theirs.
    for step in (4, 6):
        shutil.rmtree(many / "whole" / "checkpoints" / f"step-{step:08d}")
    messages = train(config, many / "whole").messages
    assert messages == ["going on from the checkpoint of step 2"]
    assert_close(one / "sharded", many / "whole")


def assert_close(a: Path, b: Path) -> None:
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (a, b))
    assert len(first) == len(second) == 8
    for row, other in zip(first, second, strict=True):
        for name in row.keys() - {"tokens_per_second"}:
            assert other[name] == pytest.approx(row[name], rel=2e-4), (b.name, name, row["step"])
    for name, tensor in weights(a).items():
        torch.testing.assert_close(weights(b)[name], tensor, rtol=1e-3, atol=2e-5)
