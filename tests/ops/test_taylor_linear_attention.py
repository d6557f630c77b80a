"""Taylor linear attention: the packed features, and the chunked form against the reference."""

import math

import pytest
import torch
from torch import Tensor

from based.ops.linear_attention import chunked
from based.ops.taylor_linear_attention import (
    num_features,
    taylor_linear_attention,
    taylor_linear_attention_outputs,
    taylor_linear_attention_step,
)
from based.ops.taylor_linear_attention.features import key_features, query_features
from based.ops.taylor_linear_attention.reference import taylor_linear_attention_reference


def make(
    batch: int, length: int, heads: int, feature_dim: int, head_dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the state that twenty earlier tokens left, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = draw(batch, length, heads, feature_dim), draw(batch, length, heads, feature_dim)
    v = draw(batch, length, heads, head_dim) + 0.5
    phi = key_features(draw(batch, 20, heads, feature_dim))
    earlier = draw(batch, 20, heads, head_dim)
    return q, k, v, torch.einsum("bthf,bthv->bhfv", phi, earlier), phi.sum(1)


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 15, 16, 24])
def test_features_are_the_taylor_polynomial(dim: int) -> None:
    q, k = torch.randn(5, dim, dtype=torch.float64), torch.randn(5, dim, dtype=torch.float64)
    s = (q * k).sum(-1) / math.sqrt(dim)
    assert key_features(k).shape[-1] == num_features(dim)
    got = (query_features(q) * key_features(k)).sum(-1)
    torch.testing.assert_close(got, 1 + s + s**2 / 2, rtol=1e-12, atol=1e-12)


def test_sixteen_gives_153_and_weights_exact_in_bfloat16() -> None:
    assert num_features(16) == 153
    weights = query_features(torch.ones(16, dtype=torch.float64))
    assert torch.equal(weights, weights.bfloat16().double())


def test_reference_is_equation_four_by_hand() -> None:
    q, k, v, _, _ = make(1, 6, 1, 3, 2)
    numerator, denominator = torch.zeros(1, 1, 10, 2).double(), torch.zeros(1, 1, 10).double()
    out, _, _ = taylor_linear_attention_reference(q, k, v, numerator, denominator)
    for t in range(6):
        weights = []
        for i in range(t + 1):
            s = sum(float(q[0, t, 0, d] * k[0, i, 0, d]) for d in range(3)) / math.sqrt(3)
            weights.append(1 + s + s * s / 2)
        want = sum(w * v[0, i, 0] for i, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(out[0, t, 0], want)


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 127, 129, 1000])
@pytest.mark.parametrize(("feature_dim", "head_dim"), [(16, 64), (8, 112), (5, 3)])
def test_chunked_is_the_reference(length: int, feature_dim: int, head_dim: int) -> None:
    arguments = make(2, length, 2, feature_dim, head_dim, seed=length)
    want = taylor_linear_attention_reference(*arguments)
    for got, expected in zip(taylor_linear_attention(*arguments), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 100, 256, 257])
def test_outputs_alone_are_the_reference(length: int) -> None:
    q, k, v, numerator, denominator = make(2, length, 2, 5, 3)
    want, *_ = taylor_linear_attention_reference(q, k, v, 0 * numerator, 0 * denominator)
    got = taylor_linear_attention_outputs(q, k, v)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("elements", [1, 1 << 16])
def test_blocks_change_neither_values_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 8)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", elements)
    arguments = [x.requires_grad_() for x in make(1, 50, 2, 4, 6)]
    weights = [torch.randn_like(x) for x in taylor_linear_attention_reference(*arguments)]

    def gradients(function) -> tuple[Tensor, ...]:
        outputs = function(*arguments)
        loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, arguments)

    expected = gradients(taylor_linear_attention_reference)
    for got, want in zip(gradients(taylor_linear_attention), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_low_precision_with_large_scores(dtype: torch.dtype, tolerance: float) -> None:
    """|s| up to about 20, relative Frobenius error against float64 on the same rounded inputs."""
    q, k, v, numerator, denominator = make(1, 700, 2, 16, 64)
    q, k, v = (x.to(dtype) for x in (q * 4, k, v))
    want, *_ = taylor_linear_attention_reference(
        q.double(), k.double(), v.double(), numerator, denominator
    )
    got, new_numerator, _ = taylor_linear_attention(q, k, v, numerator, denominator)
    assert got.dtype == dtype
    assert new_numerator.dtype == torch.float32
    assert (got.double() - want).norm() / want.norm() < tolerance


def test_a_pair_planted_far_back_is_still_recalled() -> None:
    """One key-value pair, then 200k others: its share of the output is recovered from the state."""
    length = 200_000
    key = torch.randn(16) * 3
    keys, values = torch.randn(1, length, 1, 16) * 0.1, torch.zeros(1, length, 1, 8)
    keys[0, 0, 0], values[0, 0, 0] = key, 100.0
    query = torch.zeros(1, length, 1, 16)
    query[0, -1, 0] = key
    out, *_ = taylor_linear_attention(query, keys, values)
    s = (keys.double() @ key.double())[0, :, 0] / 4
    weights = 1 + s + s**2 / 2
    want = 100.0 * weights[0] / weights.sum()
    torch.testing.assert_close(out[0, -1, 0].double(), want.expand(8), rtol=1e-4, atol=0)


def test_steps_are_the_parallel_form() -> None:
    q, k, v, numerator, denominator = make(2, 40, 3, 16, 10)
    want, final, _ = taylor_linear_attention(q, k, v, numerator, denominator)
    for t in range(40):
        got = taylor_linear_attention_step(q[:, t], k[:, t], v[:, t], numerator, denominator)
        torch.testing.assert_close(got, want[:, t], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(numerator, final, rtol=1e-10, atol=1e-10)


def test_a_nan_stays_in_its_sequence() -> None:
    q, k, v, _, _ = make(1, 300, 1, 4, 4)
    v[0, 150] = float("nan")
    out, *_ = taylor_linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 100, 200, 300]))
    assert not out[0, :100].isnan().any()
    assert out[0, 150:200].isnan().all()
    assert not out[0, 200:].isnan().any()


def test_memory_of_the_backward_pass_is_linear() -> None:
    """Bytes that autograd keeps alive between the passes, a token, at 4k and 16k tokens."""
    per_token = []
    for length in (4096, 16384):
        kept = 0

        def count(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.nbytes
            return x

        q, k, v = (x.float().requires_grad_() for x in make(1, length, 2, 16, 32)[:3])
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            taylor_linear_attention(q, k, v)
        per_token.append(kept / length)
    assert per_token[1] < 1.1 * per_token[0]
    # Features alone would be 2 x 153 x 4 bytes x 2 heads = 2448.
    assert per_token[1] < 2448


def test_autocast_does_not_touch_the_accumulators() -> None:
    q, k = (torch.randn(1, 300, 2, 16, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(1, 300, 2, 8, dtype=torch.bfloat16)
    want = taylor_linear_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = taylor_linear_attention(q, k, v)
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)
        step = [x[:, 0] for x in (q, k, v)]
        states = [(got[1].clone(), got[2].clone()) for _ in range(2)]
        taylor_linear_attention_step(*step, *states[0])
    taylor_linear_attention_step(*step, *states[1])
    for got, want in zip(*states, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
