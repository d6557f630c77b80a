"""What `benchmarks.kernels` times beside attention runs, and computes the same."""

import pytest
import torch
from torch import Tensor

from based.errors import BasedError
from benchmarks import kernels, pointwise, recurrences, timing
from benchmarks.timing import Case, Rates


@pytest.fixture(autouse=True)
def _small_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pointwise, timing):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for module in (pointwise, recurrences):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    sizes = {"BATCH": 2, "TOKENS": 3, "HEADS": 2, "VOCABULARY": 11, "WIDTHS": (8, 12)}
    for name, value in sizes.items():
        monkeypatch.setattr(pointwise, name, value)


@pytest.mark.parametrize("op", pointwise.OPS)
def test_implementations_of_an_op_agree(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[object] = []
    monkeypatch.setattr(timing, "milliseconds", lambda call, *_: results.append(call()) or 2.0)
    first: dict[tuple[object, ...], list[Tensor]] = {}
    for key, measure in pointwise.OPS[op](Rates(1e9, 1e9)):
        values = measure()
        assert values is not None
        assert 0 < values["floor_ms"] < 1
        if key["direction"] == "forward":
            got = timing._outputs(results[-1])
            case = (key["tokens"], key["head_dim"])
            for a, b in zip(got, first.setdefault(case, list(got)), strict=True):
                torch.testing.assert_close(a.view_as(b), b, rtol=2e-2, atol=2e-2)
    assert len(first) == 2


LAB, MODEL = (recurrences.Size(2, 19, dtype) for dtype in (torch.float32, torch.bfloat16))
SMALL = {
    "DECAY_A_HEAD": (2, 4, 6),
    "DECAY_A_CHANNEL": (2, 4, 6),
    "DELTA": (2, 4, 6),
    "GATED_DELTA": (2, 4, 6),
    "GENERALIZED_DELTA": (2, 4, 6),
    "SCAN": (6, 4),
    "NORM": 2,
    "CONVOLUTION": 6,
}


@pytest.mark.parametrize("op", recurrences.OPS)
def test_implementations_of_a_recurrence_agree(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours by kernels in the interpreter (the scan's need a GPU), PyTorch's beside them."""
    monkeypatch.setattr("based.ops.kernels.INTERPRETING", True)
    for name, shape in SMALL.items():
        monkeypatch.setattr(recurrences, name, {LAB: (shape,), MODEL: (shape,)})
    results: list[object] = []
    monkeypatch.setattr(timing, "milliseconds", lambda call, *_: results.append(call()) or 2.0)
    first: dict[tuple[object, ...], list[Tensor]] = {}
    for key, measure in recurrences.OPS[op](Rates(1e9, 1e9)):
        assert key["op"] == op
        assert measure() is not None
        kind = tuple(value for name, value in key.items() if name != "implementation")
        got, near = timing._outputs(results[-1]), 2e-5 if key["bits"] == 32 else 5e-2
        for a, b in zip(got, first.setdefault(kind, list(got)), strict=True):
            if key["direction"] == "forward":
                torch.testing.assert_close(a, b, rtol=near, atol=near)
    assert len(first) in (4, 8)


def test_thunderkittens_is_a_row_where_its_kernel_fits(tmp_path, monkeypatch) -> None:
    assert kernels.thunderkittens.takes(Case(1, 16, 4096, 64))
    assert not kernels.thunderkittens.takes(Case(1, 16, 4096, 112))
    assert not kernels.thunderkittens.takes(Case(1, 16, 100, 64))
    with pytest.raises(BasedError, match="no checkout of ThunderKittens"):
        kernels.thunderkittens.load(tmp_path)
    monkeypatch.setattr(timing, "milliseconds", lambda call, graph: 2.0 if not graph else None)
    inputs = [torch.zeros(1)] * 2
    cells = kernels.kittens_rows(torch.add, Case(2, 3, 64, 64), inputs, (0.5, 1.5))
    ((key, measure),) = cells
    assert (key["implementation"], key["direction"]) == ("ThunderKittens", "forward")
    assert measure() == {"ms": 2.0, "floor_ms": 0.5}
