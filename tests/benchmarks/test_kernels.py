"""What `benchmarks.kernels` times beside attention runs, and computes the same."""

import pytest
import torch
from torch import Tensor

from based.errors import BasedError
from benchmarks import kernels, pointwise, timing
from benchmarks.timing import Case, Rates


@pytest.fixture(autouse=True)
def _small_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pointwise, timing):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    sizes = {"BATCH": 2, "TOKENS": 3, "HEADS": 2, "VOCABULARY": 11, "WIDTHS": (8, 12)}
    for name, value in sizes.items():
        monkeypatch.setattr(pointwise, name, value)
    monkeypatch.setattr(pointwise, "compiled", lambda function: function)


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
