"""Recorded and fused steps on a GPU are the plain steps of a CPU."""

import pytest
import torch

from based.recall.architectures import ARCHITECTURES, build_model
from based.recall.config import Point, Recipe
from based.recall.lanes import Lanes
from based.recall.mqar import Task, segment
from based.recall.steps import stepper, train_step
from based.recall.train import evaluate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TASK, LONG = Task(64, 8, 16), Task(512, 32, 4)
RECIPE = Recipe(
    vocab_size=256,
    train=(TASK,),
    test=(TASK, LONG),
    batch_size=16,
    embedding_dropout=0.0,
    attention_dropout=0.0,
)
RATES = (1e-3, 3e-3)


def lanes_of(architecture: str, device: str, dtype: torch.dtype) -> Lanes:
    model = build_model(Point(architecture, 64), RECIPE).to(device, dtype)
    model.train()
    return Lanes(model, RATES, weight_decay=0.1)


# The compiler warns of what it leaves alone, complex numbers for one.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recorded_steps_are_plain_steps(architecture: str, fuse: bool) -> None:
    if fuse and architecture not in ("based", "sliding_window", "mamba", "delta_net", "h3"):
        pytest.skip("one of each kind of operator: compiling takes long")
    exact = lanes_of(architecture, "cpu", torch.float64)
    lanes = lanes_of(architecture, "cuda", torch.float32)
    assert lanes.stacked
    step = stepper(lanes, fuse, RECIPE.batch_size)
    for seed, examples in enumerate((16, 5, 16, 16)):
        batch = segment(TASK._replace(examples=examples), 256, seed=seed)
        train_step(exact, batch)
        step(lanes, batch.to(torch.device("cuda")))
    assert getattr(step, "fuses", False) == fuse
    torch.testing.assert_close(lanes.losses.cpu().double(), exact.losses, rtol=1e-3, atol=0)
    # Small gradients make AdamW's first steps a matter of rounding, here and there.
    apart = (lanes.flat.detach().cpu() - exact.flat.detach()).abs()
    assert apart.mean() < 2e-4
    long = segment(LONG, 256, seed=9).to(torch.device("cuda"))
    assert evaluate(lanes, [0, 1], [long]).shape == (2, 1)
