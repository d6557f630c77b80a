import pytest
import torch

from based.ops.stacked_linear import split, stacked_linear
from based.ops.stacked_linear.reference import stacked_linear_reference


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (7, 1), (513, 1), (768, 2), (4096, 16)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_outputs_and_gradients_are_the_references(rows: int, parts: int, has_bias: bool) -> None:
    torch.manual_seed(rows)
    assert split._parts(3, rows, 8, 70) == parts
    x, weight, bias = (
        torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
        for shape in ((rows, 8), (70, 8), (70,))
    )
    given = (x, weight, bias if has_bias else None)
    upstream = torch.randn(3, rows, 70, dtype=torch.float64)
    found = []
    for function in (stacked_linear, stacked_linear_reference):
        y = function(*given)
        leaves = [leaf for leaf in given if leaf is not None]
        found.append((y, *torch.autograd.grad((y * upstream).sum(), leaves)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_parts_fill_a_gpu_and_no_more() -> None:
    assert split._parts(4, 1 << 16, 64, 64) == 128
    assert split._parts(4, 1 << 16, 128, 384) == 8
    assert split._parts(4, 1 << 16, 1024, 1024) == 1


def test_autocast_multiplies_in_its_dtype() -> None:
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(2, 4, 8, requires_grad=True), None
    with torch.autocast("cpu", torch.bfloat16):
        y = stacked_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
