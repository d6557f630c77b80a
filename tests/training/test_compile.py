"""Compiled blocks: once a kind, without a break, and the same numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from torch._dynamo.utils import counters
from torch.nn import Module

from based.generation import prefill
from based.models import Decoder
from based.models.presets import based_model
from based.training import TrainConfig
from based.training.learner import Learner
from based.training.parallel import Ranks, join_job

CONFIG = TrainConfig(Path("synthetic"), batch_size=2, length=40, micro_batch=1)
SHAPE = based_model(48, 7, (1, 4), (2, 5), num_heads=4, window=9, vocab_size=64)


def train(config: TrainConfig, place: Ranks) -> list[float]:
    torch.manual_seed(0)
    rows = torch.randint(64, (2, 41))
    learner = Learner(SHAPE, config, place)
    for _ in range(2):
        numbers = learner.gradients(rows)
        learner.update(1e-3)
    return [number.item() for number in numbers]


def job(config: TrainConfig) -> tuple[list[float], list[float], int, list[str]]:
    """Where types are not checked at each call, which a compiler cannot follow."""
    # The graphs are what is tested; generating code for them would take a minute.
    compile_with = Module.compile
    Module.compile = lambda self, **options: compile_with(
        self, **options, backend="aot_eager", fullgraph=True
    )
    alone = Ranks(torch.device("cpu"))
    compiled = train(replace(config, compile=True), alone)
    graphs, breaks = counters["stats"]["unique_graphs"], list(counters["graph_break"])
    return train(config, alone), compiled, graphs, breaks


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_each_kind_of_block_is_compiled_once_and_whole(precision) -> None:
    """In bfloat16 with float32 weights behind (FSDP), as on a GPU."""
    ((plain, compiled, graphs, breaks),) = ranks.run(1, job, replace(CONFIG, precision=precision))
    assert compiled == pytest.approx(plain, rel=1e-5 if precision == "float32" else 1e-2)
    assert breaks == []
    assert graphs == 3


def shared_job() -> tuple[list[float], list[float], int]:
    """The same on two ranks that share each sequence: a block is cut where they exchange."""
    device = join_job("cpu")
    compile_with = Module.compile
    Module.compile = lambda self, **options: compile_with(self, **options, backend="aot_eager")
    config = replace(CONFIG, context_parallel=2, recompute=True, precision="bfloat16")
    compiled = train(replace(config, compile=True), Ranks(device, 2))
    return train(config, Ranks(device, 2)), compiled, counters["stats"]["unique_graphs"]


def test_blocks_of_shared_sequences_are_compiled_around_the_exchange() -> None:
    for plain, compiled, graphs in ranks.run(2, shared_job):
        assert compiled == pytest.approx(plain, rel=1e-2)
        assert graphs <= 2 * 3 + 1


def prompts() -> tuple[float, list[str]]:
    """Largest difference of compiled blocks' prefill, from prompt to state."""
    compile_with = Module.compile
    Module.compile = lambda self, **options: compile_with(
        self, **options, backend="aot_eager", fullgraph=True
    )
    torch.manual_seed(0)
    net, tokens = Decoder(SHAPE).eval(), torch.randint(64, (2, 80))
    want, states = prefill(net, tokens, net.init_state(2), chunk=40)
    net.compile_blocks()
    got, compiled = prefill(net, tokens, net.init_state(2), chunk=40)
    differences = [(got - want).abs().max()]
    for a, b in zip(states, compiled, strict=True):
        differences += [(a[name] - b[name]).abs().max() for name in a]
    return max(map(float, differences)), list(counters["graph_break"])


def test_prompts_are_read_by_compiled_blocks_without_a_break() -> None:
    ((difference, breaks),) = ranks.run(1, prompts)
    assert difference < 1e-4
    assert breaks == []
