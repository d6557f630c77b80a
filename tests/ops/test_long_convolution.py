"""The long convolution by Fourier transform against the sum."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from based.ops.long_convolution import long_convolution
from based.ops.long_convolution.reference import long_convolution_reference
from based.ops.long_convolution.toeplitz import convolve_by_products


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 200])
@pytest.mark.parametrize("taps", [1, 2, 33, 300])
def test_it_is_the_sum(length: int, taps: int) -> None:
    x = torch.randn(2, length, 3, dtype=torch.float64)
    h = torch.randn(taps, 3, dtype=torch.float64)
    want = long_convolution_reference(x, h)
    torch.testing.assert_close(long_convolution(x, h), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (7, 3), (65, 65)])
def test_products_are_the_sum(length: int, taps: int) -> None:
    x = torch.randn(2, length, 3, dtype=torch.float64)
    h = torch.randn(taps, 3, dtype=torch.float64)
    want = long_convolution_reference(x, h)
    torch.testing.assert_close(convolve_by_products(x, h), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convolve", [long_convolution, convolve_by_products])
def test_gradients(convolve: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.randn(2, 9, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(convolve, (x, h))


def test_products_in_lanes() -> None:
    x, h = torch.randn(3, 2, 9, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    got = torch.vmap(convolve_by_products)(x, h)
    want = torch.stack([long_convolution_reference(*lane) for lane in zip(x, h, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_nothing_wraps_round() -> None:
    """An impulse at the end of 64 tokens, under a filter as long, is not seen at the start."""
    x, h = torch.zeros(1, 64, 1), torch.ones(64, 1)
    x[0, -1] = 1e3
    y = long_convolution(x, h)
    assert y[0, :-1].abs().max() < 1e-3
    assert y[0, -1] == pytest.approx(1e3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    x, h = torch.randn(2, 500, 4).to(dtype), torch.randn(500, 4).to(dtype)
    want = long_convolution_reference(x.double(), h.double())
    got = long_convolution(x, h)
    assert got.dtype == dtype
    assert (got.double() - want).norm() / want.norm() < tolerance
