"""Eight-bit weights: a little error, half of the bytes, the same engine."""

import subprocess
import sys

import pytest
import torch

from based.errors import BasedError
from based.generation import Engine, EngineConfig
from based.generation.quantization import quantize_weights
from based.models import Decoder, preset
from benchmarks.floors import weight_bytes


def make() -> Decoder:
    torch.manual_seed(0)
    return Decoder(preset("based-tiny", vocab_size=60)).bfloat16()


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.02), ("float8", 0.06)])
def test_logits_change_little(precision, most) -> None:
    model, tokens = make(), torch.randint(60, (2, 40))
    with torch.no_grad():
        want = model(tokens)[0].float()
        quantize_weights(model.blocks, precision)
        got = model(tokens)[0].float()
    error = (got - want).norm() / want.norm()
    assert 0 < error < most


def test_a_floor_counts_the_bytes_that_are_read() -> None:
    model = make()
    weight = model.blocks[0].mlp.fc1.weight
    assert weight_bytes(weight) == weight.nbytes
    quantize_weights(model.blocks, "int8")
    eight = model.blocks[0].mlp.fc1.weight
    assert weight_bytes(eight) == weight.numel() + 4 * weight.shape[0]


# In a process of its own: annotations are not checked there, which torch.compile cannot follow.
SCRIPT = """
import functools, torch
from based.generation import Engine, EngineConfig, Sampling
from based.models import Decoder, preset
torch.set_num_threads(1)
# Captured whole, as on a GPU, where code is generated too. Off the kernels, a step that
# defers looks at its data.
torch.compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
model = Decoder(preset("based-tiny", vocab_size=60)).bfloat16()
# Fewer are not worth compiling for.
engine = Engine(model, EngineConfig(slots=5, quantize="int8", recent=0))
request = engine.submit([1, 2, 3], Sampling(temperature=0.0, max_new_tokens=12))
while engine.busy:
    engine.step()
# However many layers: of each of three kinds one graph, and those of the first and last block.
from torch._dynamo.utils import counters
print(request.finish_reason, len(request.tokens), counters["stats"]["unique_graphs"] <= 6)
"""


def test_the_engine_runs_on_them() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.split() == ["length", "12", "True"], done.stderr


def test_without_torchao(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(BasedError, match=r"need torchao: pip install 'based\[quantize\]'"):
        Engine(make(), EngineConfig(slots=1, quantize="int8"))
