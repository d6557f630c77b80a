"""Stacked models compute what each would alone: every architecture, and the whole step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from based.ops import kernels
from based.ops.stacked_linear import stacked_linear
from based.recall.architectures import ARCHITECTURES, build_model
from based.recall.config import Point, Recipe
from based.recall.lanes import Lanes
from based.recall.mqar import Segment, Task, segment
from based.recall.steps import RecordedSteps, fused, train_step

RECIPE = Recipe(vocab_size=32, train=(Task(24, 4, 8),), test=(Task(24, 4, 8),), batch_size=4)
RATES = (1e-2, 1e-3, 3e-2)


def lanes_of(architecture: str, rates: tuple[float, ...] = RATES) -> Lanes:
    model = build_model(Point(architecture, 64), RECIPE).double()
    model.train()
    return Lanes(model, rates, weight_decay=0.1)


def batch(examples: int = 4, seed: int = 0) -> Segment:
    return segment(Task(24, 4, examples), 32, seed=seed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lanes_are_the_models_alone(architecture: str) -> None:
    """Two steps, so that the lanes differ: losses and all parameters, dropout included."""
    stacked = lanes_of(architecture)
    assert stacked.stacked
    alone = [lanes_of(architecture, (rate,)) for rate in RATES]
    for lanes in (stacked, *alone):
        torch.manual_seed(1)
        for seed in (0, 1):
            train_step(lanes, batch(seed=seed))
    together = torch.cat([lanes.flat for lanes in alone])
    torch.testing.assert_close(stacked.flat, together, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        stacked.losses, torch.cat([lanes.losses for lanes in alone]), rtol=0, atol=1e-9
    )
    assert (stacked.flat[0] - stacked.flat[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "architecture",
    ["based", "gla", "gated_delta_net", "mamba2", "rwkv7", "hyena", "h3"],
)
def test_kernels_in_lanes_are_pytorchs(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and gradients of float32 kernels, interpreted, and of PyTorch's float64."""

    def found(lanes: Lanes) -> list[Tensor]:
        torch.manual_seed(0)
        hidden, _ = lanes.hidden(*batch(1)[:2])
        weight = torch.linspace(-1, 1, hidden.numel()).view_as(hidden).to(hidden)
        return [hidden, *torch.autograd.grad((hidden * weight).sum(), lanes.flat)]

    exact = Lanes(lanes_of(architecture).model.eval(), RATES[:2], weight_decay=0.1)
    want = found(exact)
    mine = Lanes(lanes_of(architecture).model.eval().float(), RATES[:2], weight_decay=0.1)
    monkeypatch.setattr(kernels, "INTERPRETING", True)
    for one, other in zip(found(mine), want, strict=True):
        assert (one.double() - other).norm() < 1e-4 * other.norm()


def test_linear_layers_of_all_lanes_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        widths.append(weight.shape)
        return stacked_linear(x, weight, bias)

    stacked = lanes_of("attention")
    monkeypatch.setattr("based.recall.lanes.stacked_linear", counting)
    stacked.hidden(*batch()[:2])
    assert widths == [(3, 64, 64), (3, 192, 64), (3, 64, 64)]


def test_an_op_without_a_form_over_lanes_runs_lane_by_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: torch.nn.Module, x: Tensor, *rest: object) -> tuple[Tensor, None]:
        # Reading a number out of a tensor is what vmap cannot do.
        return x * float(x.detach().flatten()[0] * 0 + 2), None

    want = lanes_of("gla")
    monkeypatch.setattr("based.mixers.base_convolution.BaseConvolution.mix", forward)
    lanes = lanes_of("gla")
    assert want.stacked
    assert not lanes.stacked
    hidden, _ = lanes.hidden(*batch()[:2])
    assert hidden.shape == (3, 4, 4, 64)


def test_the_step_is_adamw_on_the_mean_cross_entropy() -> None:
    """Against torch's own AdamW on the plain model, which knows nothing of lanes."""
    lanes = lanes_of("based")
    # No dropout, so that the plain form is the training form.
    lanes.model.config = type(lanes.model.config)(
        **{**vars(lanes.model.config), "embedding_dropout": 0.0}
    )
    reference = [build_model(Point("based", 64), RECIPE).double() for _ in RATES]
    for model, rate in zip(reference, RATES, strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
        for seed in range(3):
            tokens, positions, answers = batch(seed=seed)
            logits = model.logits(model(tokens, positions))
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), answers.flatten().long()).backward()
            optimizer.step()
    for seed in range(3):
        train_step(lanes, batch(seed=seed))
    for lane, model in enumerate(reference):
        own = lanes.alone(lane)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(own[name], parameter.detach(), rtol=0, atol=1e-10)


def test_embedding_dropout_is_of_the_published_share_and_of_training_alone() -> None:
    lanes = lanes_of("based")
    x = lanes._embed(torch.ones(3, 32, 64, dtype=torch.float64), torch.zeros(40, 24).int())
    assert abs((x == 0).double().mean() - 0.1) < 0.01
    assert x[x != 0].allclose(torch.tensor(1 / 0.9, dtype=torch.float64))
    assert torch.equal(x[0], x[2])
    tokens, positions, _ = batch()
    own = lanes.alone(0)
    first, second = (functional_call(lanes.model, own, (tokens, positions)) for _ in range(2))
    assert torch.equal(first, second)


def test_keeping_some_lanes_goes_on_with_them() -> None:
    lanes, kept = lanes_of("gla"), lanes_of("gla")
    for one in (lanes, kept):
        torch.manual_seed(1)
        train_step(one, batch())
    kept.keep([2, 0])
    assert kept.peaks == (RATES[2], RATES[0])
    for one in (lanes, kept):
        torch.manual_seed(2)
        one.set_rate(0.5)
        train_step(one, batch(seed=1))
    torch.testing.assert_close(kept.flat, lanes.flat[[2, 0]], rtol=0, atol=1e-12)


def test_recorded_steps_are_plain_steps() -> None:
    """A recorder as a GPU's: it runs a new step twice to warm up, then gives it back."""
    recorded: list[torch.Size] = []
    plain, lanes = lanes_of("based"), lanes_of("based")

    def record(step: Callable[[], None]) -> Callable[[], None]:
        step()
        step()
        recorded.append(lanes.flat.shape)
        return step

    steps = RecordedSteps(lanes, record)
    batches = [batch(4, 0), batch(4, 1), batch(2, 2), batch(4, 3), batch(2, 4)]
    for take, own in ((train_step, plain), (steps, lanes)):
        torch.manual_seed(3)
        for one in batches:
            take(own, one)
    assert len(recorded) == 2
    assert torch.equal(lanes.flat, plain.flat)
    assert torch.equal(lanes.losses, plain.losses)
    assert lanes.steps == 5


# One of each kind of operator; every architecture takes minutes to compile.
@pytest.mark.parametrize("architecture", ["based", "attention", "delta_net"])
def test_fused_steps_are_plain_steps(architecture: str) -> None:
    """Traced and compiled below vmap and autograd; a smaller batch is not."""
    plain, lanes = lanes_of(architecture), lanes_of(architecture)
    fuse = partial(fused, backend="aot_eager")
    steps = RecordedSteps(lanes, lambda step: step, fuse, batch_size=4)
    for take, own in ((train_step, plain), (steps, lanes)):
        torch.manual_seed(3)
        for seed, examples in enumerate((4, 4, 2, 4)):
            take(own, batch(examples, seed))
    assert steps.fuses
    torch.testing.assert_close(lanes.flat, plain.flat, rtol=0, atol=1e-12)
    torch.testing.assert_close(lanes.losses, plain.losses, rtol=0, atol=1e-12)


def test_a_compiler_that_fails_costs_its_speed_alone() -> None:
    def fuse(own: Lanes, inputs: Segment) -> Callable[[], None]:
        train_step(own, inputs)
        raise RuntimeError("no such device")

    plain, lanes = lanes_of("based"), lanes_of("based")
    steps = RecordedSteps(lanes, lambda step: step, fuse, batch_size=4)
    torch.manual_seed(3)
    train_step(plain, batch())
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="not fused: RuntimeError: no such device"):
        steps(lanes, batch())
    assert not steps.fuses
    assert torch.equal(lanes.flat, plain.flat)


class NothingReadByTheHost(TorchDispatchMode):
    """Refuses what a recorded GPU step cannot do: bring a number to the host."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(op) for name in self.READS), op
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_reads_nothing_back(architecture: str) -> None:
    lanes, one = lanes_of(architecture), batch()
    with NothingReadByTheHost():
        train_step(lanes, one)
