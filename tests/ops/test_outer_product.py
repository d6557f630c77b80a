"""Outer products of heads and vector-matrix products: the kernels, in lanes too."""

from functools import partial

import pytest
import torch
from test_row_kernels import DEVICE, check, randn
from torch import Tensor

from based.ops import kernels
from based.ops.outer_product import operator, outer_product, vector_matrix_product
from based.ops.outer_product.reference import (
    outer_product_reference,
    vector_matrix_product_reference,
)

SHAPES = [(2, 5, 3, 2), (1, 33, 35, 1), (2, 3, 2, 4), (1, 4, 2, 5)]


@pytest.fixture(autouse=True)
def _with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETING", DEVICE == "cpu")


@pytest.mark.parametrize(("B", "T", "H", "D"), SHAPES)
def test_outer_product(B: int, T: int, H: int, D: int) -> None:
    a, b = randn(2, B, T, H * D)
    op, want = (partial(f, heads=H) for f in (outer_product, outer_product_reference))
    check(op, want, a, b)


@pytest.mark.parametrize(("B", "T", "H", "D"), SHAPES)
def test_vector_matrix_product(B: int, T: int, H: int, D: int) -> None:
    a, m = randn(B, T, H * D), randn(B, T, H, D, D)
    check(vector_matrix_product, vector_matrix_product_reference, a, m)


def test_in_lanes() -> None:
    """One of the vectors is shared by the lanes, another one a slice."""
    a, b, q = randn(4, 2, 5, 12)[..., 6:], randn(2, 5, 6), randn(4, 2, 5, 6)

    def mine(a: Tensor, b: Tensor, q: Tensor) -> Tensor:
        return vector_matrix_product(q, outer_product(a, b, 3).cumsum(1))

    def exact(a: Tensor, b: Tensor, q: Tensor) -> Tensor:
        return vector_matrix_product_reference(q, outer_product_reference(a, b, 3).cumsum(1))

    over_lanes = partial(torch.vmap, in_dims=(0, None, 0))
    check(over_lanes(mine), over_lanes(exact), a, b, q)


def test_a_heads_tokens_are_one_matrix_in_memory() -> None:
    """Of all rows and channels of a head, a lane at a time."""
    a, b = (torch.randn(4, 2, 5, 6, device=DEVICE) for _ in range(2))
    m = torch.vmap(partial(outer_product, heads=3))(a, b)
    assert m.permute(0, 3, 1, 4, 5, 2).is_contiguous()


def test_a_gradient_has_the_layout_of_its_vector() -> None:
    a, b = (torch.randn(2, 6, 5, device=DEVICE).mT.requires_grad_() for _ in range(2))
    (gradient,) = torch.autograd.grad(outer_product(a, b, 3).square().sum(), a)
    assert gradient.stride() == a.stride()


def test_opcheck() -> None:
    a, b = (torch.randn(2, 3, 5, 6, device=DEVICE) for _ in range(2))
    torch.library.opcheck(operator._outer, (a, b, 3))
    m = operator._by_token(operator._outer(a, b, 3))
    torch.library.opcheck(operator._product, (a, m, b.mT.contiguous().mT))


def test_low_precision() -> None:
    a, b = (torch.randn(2, 5, 6, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    m = outer_product(a, b, 3)
    torch.testing.assert_close(m, outer_product_reference(a, b, 3))
    y = vector_matrix_product(a, m)
    torch.testing.assert_close(y, vector_matrix_product_reference(a.float(), m.float()).bfloat16())
