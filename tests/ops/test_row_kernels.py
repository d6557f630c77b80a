"""Convolutions and norms whose weights differ from row to row: the kernels, and lanes."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from based.ops import kernels
from based.ops.gated_norm import gated_norm
from based.ops.gated_norm import operator as gated_norm_operator
from based.ops.gated_norm.reference import gated_norm_reference
from based.ops.gated_short_convolution.shifted import short_convolution
from based.ops.row_norm import layer_norm, rms_norm
from based.ops.row_norm import operator as norm_operator
from based.ops.short_convolution import activated_convolution
from based.ops.short_convolution import operator as convolution_operator

# Without a GPU the kernels are interpreted.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETING", DEVICE == "cpu")
    # So that short sequences have several stretches too.
    monkeypatch.setattr(convolution_operator, "STRETCH", 32)
    monkeypatch.setattr(norm_operator, "STRETCH", 32)
    monkeypatch.setattr(gated_norm_operator, "STRETCH", 32)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check(op: Callable[..., Tensor], want: Callable[..., Tensor], *inputs: Tensor) -> None:
    """`op` in float32 is `want` in float64, gradients too."""
    exact = [x.clone().requires_grad_() for x in inputs]
    mine = [x.float().to(DEVICE).requires_grad_() for x in inputs]
    y, z = op(*mine), want(*exact)
    weight = torch.randn_like(z)
    got = [y, *torch.autograd.grad(y, mine, weight.to(y))]
    for one, other in zip(got, [z, *torch.autograd.grad(z, exact, weight)], strict=True):
        assert one.shape == other.shape
        assert (one.cpu() - other).norm() < 2e-6 * other.norm()


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = short_convolution(x, weight)
    return F.silu(y if bias is None else y + bias)


def gated(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    return (short_convolution(x, weight) + bias) * gate + x


@pytest.mark.parametrize(("T", "C", "W"), [(1, 3, 3), (16, 64, 4), (75, 70, 3), (33, 8, 1)])
def test_the_convolution_and_what_follows(T: int, C: int, W: int) -> None:
    x, weight, bias = randn(2, T, C), randn(C, W), randn(C)
    check(activated_convolution, plain, x, weight)
    check(activated_convolution, plain, x, weight, bias)
    check(activated_convolution, gated, x, weight, bias, randn(2, T, C))
    linear = partial(activated_convolution, silu=False)
    check(linear, lambda x, weight, bias: short_convolution(x, weight) + bias, x, weight, bias)


def test_a_past_takes_the_shifted_form() -> None:
    x, weight, past = randn(2, 9, 5), randn(5, 3), randn(2, 2, 5)
    whole = F.silu(short_convolution(torch.cat([past, x], 1), weight))[:, 2:]
    torch.testing.assert_close(activated_convolution(x, weight, past=past), whole)


@pytest.mark.parametrize(("T", "C"), [(1, 5), (40, 16), (70, 48)])
def test_norms_in_lanes(T: int, C: int) -> None:
    x, weight, bias = randn(3, 2, T, C), randn(3, C), randn(3, C)

    def apart(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *lanes: torch.stack([op(*lane) for lane in zip(*lanes, strict=True)])

    def with_residual(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, weight, bias, residual=True)

    check(
        torch.vmap(layer_norm), apart(lambda x, *own: F.layer_norm(x, (C,), *own)), x, weight, bias
    )
    check(torch.vmap(with_residual), apart(with_residual), x, weight, bias)
    check(torch.vmap(rms_norm), apart(lambda x, w: F.rms_norm(x, (C,), w, 1e-5)), x, weight)
    heads = x.unflatten(-1, (1, C)).expand(3, 2, T, 4, C)
    check(torch.vmap(rms_norm), apart(lambda x, w: F.rms_norm(x, (C,), w, 1e-5)), heads, weight)


def test_convolutions_in_lanes() -> None:
    x, weight, bias, gate = randn(3, 2, 20, 6), randn(3, 6, 4), randn(3, 6), randn(3, 2, 20, 6)

    def apart(*lanes: Tensor) -> Tensor:
        return torch.stack([gated(*lane) for lane in zip(*lanes, strict=True)])

    check(torch.vmap(activated_convolution), apart, x, weight, bias, gate)


def gated_norm_inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, u, z, skip and weight for a shape [..., H, P]."""
    H, P = shape[-2:]
    return randn(*shape), randn(*shape), randn(*shape[:-2], H * P), randn(H), randn(H * P)


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 5), (2, 33, 4, 16), (1, 75, 3, 20), (1, 2, 18, 64), (3, 3, 20)]
)
def test_the_gated_norm(shape: tuple[int, ...]) -> None:
    check(gated_norm, gated_norm_reference, *gated_norm_inputs(*shape))


def test_the_gated_norm_in_pytorch() -> None:
    inputs = gated_norm_inputs(2, 9, 3, 20)  # float64 has no kernel
    torch.testing.assert_close(gated_norm(*inputs), gated_norm_reference(*inputs))


def test_gated_norms_in_lanes() -> None:
    y, u, z, _, _ = gated_norm_inputs(3, 2, 37, 3, 20)

    def apart(*lanes: Tensor) -> Tensor:
        return torch.stack([gated_norm_reference(*lane) for lane in zip(*lanes, strict=True)])

    check(torch.vmap(gated_norm), apart, y, u, z, randn(3, 3), randn(3, 60))


def test_gated_norms_of_slices_in_sixteen_bits() -> None:
    y, *_, skip, weight = (x.bfloat16() for x in gated_norm_inputs(2, 37, 3, 20))
    wide = randn(2, 37, 3 + 60 + 60).bfloat16()

    def sliced(y: Tensor, wide: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
        u = wide[..., 3:63].unflatten(-1, (3, 20))
        return gated_norm(y, u, wide[..., 63:], skip, weight)

    exact = [x.double().requires_grad_() for x in (y, wide, skip, weight)]
    mine = [x.to(DEVICE).requires_grad_() for x in (y, wide, skip, weight)]
    got, want = sliced(*mine), sliced(*exact)
    given = torch.randn_like(want).bfloat16()
    gradients = torch.autograd.grad(got, mine, given.to(DEVICE))
    others = torch.autograd.grad(want, exact, given.double())
    for one, other in zip((got, *gradients), (want, *others), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.cpu() - other).norm() < 4e-3 * other.norm()


def test_opcheck_of_the_gated_norm() -> None:
    y, u, z, skip, weight = (x.float().to(DEVICE) for x in gated_norm_inputs(2, 5, 3, 4))
    rows = y.flatten(2), u.flatten(2), z, skip.expand(2, -1), weight.expand(2, -1)
    torch.library.opcheck(gated_norm_operator._forward, (*rows, 1e-5))
    torch.library.opcheck(gated_norm_operator._backward, (*rows, z, 1e-5))


def test_sixteen_bits_and_slices() -> None:
    x, weight = randn(2, 20, 12).bfloat16().to(DEVICE), randn(6, 4).bfloat16().to(DEVICE)
    y = activated_convolution(x[..., 6:], weight)
    assert y.dtype == torch.bfloat16
    want = plain(x[..., 6:].cpu().double(), weight.cpu().double())
    assert (y.cpu() - want).norm() < 4e-3 * want.norm()
