"""Linear attention over given features: the chunked form and the step against the reference."""

import pytest
import torch
from torch import Tensor

from based.ops.linear_attention import (
    chunked,
    linear_attention,
    linear_attention_outputs,
    linear_attention_step,
)
from based.ops.linear_attention.reference import linear_attention_reference


def make(length: int, features: int = 6, head_dim: int = 5) -> list[Tensor]:
    """Positive features, values, and the state that earlier tokens left, in float64."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64)

    q, k = draw(2, length, 3, features), draw(2, length, 3, features)
    return [
        q,
        k,
        draw(2, length, 3, head_dim) - 0.5,
        draw(2, 3, features, head_dim),
        draw(2, 3, features),
    ]


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
def test_chunked_is_the_reference(length: int) -> None:
    arguments = make(length)
    for got, want in zip(
        linear_attention(*arguments), linear_attention_reference(*arguments), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 1 << 21])
def test_gradients_are_the_references(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 8)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", elements)
    arguments = [x.requires_grad_() for x in make(37)]
    weights = [torch.randn_like(x) for x in linear_attention_reference(*arguments)]

    def gradients(function) -> tuple[Tensor, ...]:
        outputs = function(*arguments)
        return torch.autograd.grad(outputs, arguments, weights)

    for got, want in zip(
        gradients(linear_attention), gradients(linear_attention_reference), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 50, 256, 257])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_alone_are_the_same_outputs(length: int, packed: bool) -> None:
    """Short sequences take the quadratic form here: values and gradients."""
    edges = torch.tensor([0, length // 3, length]) if packed else None
    q, k, v = (x[:1].requires_grad_() for x in make(length)[:3])
    results = []
    for out in (
        linear_attention_outputs(q, k, v, edges),
        linear_attention(q, k, v, None, None, edges)[0],
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_steps_are_the_parallel_form() -> None:
    q, k, v, numerator, denominator = make(20)
    want, after, _ = linear_attention(q, k, v, numerator, denominator)
    for t in range(20):
        got = linear_attention_step(q[:, t], k[:, t], v[:, t], numerator, denominator)
        torch.testing.assert_close(got, want[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(numerator, after, rtol=1e-12, atol=1e-12)


def test_packed_sequences_are_separate() -> None:
    q, k, v, _, _ = (x[:1] for x in make(40))
    edges = torch.tensor([0, 13, 13, 40])
    packed, numerator, _ = linear_attention(q, k, v, cu_seqlens=edges)
    for row, (start, end) in enumerate([(0, 13), (13, 13), (13, 40)]):
        alone, state, _ = linear_attention(*(x[:, start:end] for x in (q, k, v)))
        torch.testing.assert_close(packed[:, start:end], alone)
        torch.testing.assert_close(numerator[row], state[0])


def test_features_that_are_all_zero_give_zeros() -> None:
    q, k, v, _, _ = make(150)
    q[:, 77] = 0
    out, *_ = linear_attention(q, k, v)
    assert (out[:, 77] == 0).all()
    assert (out[:, 76] != 0).all()


def test_bfloat16_accumulates_in_float32() -> None:
    q, k, v, _, _ = (x.bfloat16() for x in make(400))
    want, state, _ = linear_attention(q.double(), k.double(), v.double())
    got, numerator, _ = linear_attention(q, k, v)
    assert got.dtype == torch.bfloat16
    assert numerator.dtype == torch.float32
    torch.testing.assert_close(numerator.double(), state, rtol=1e-5, atol=1e-4)
    assert (got.double() - want).norm() / want.norm() < 4e-3
