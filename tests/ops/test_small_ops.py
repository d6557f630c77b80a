"""Convolution, rotary, softmax attention and packed-batch helpers against their references."""

import math
import weakref

import pytest
import torch
from torch import Tensor

from based.ops.gated_short_convolution import gated_short_convolution
from based.ops.gated_short_convolution.reference import gated_short_convolution_reference
from based.ops.packed import once_a_batch, positions, sequence_ids
from based.ops.rotary import inverse_frequencies, rotate
from based.ops.softmax_attention import sdpa, softmax_attention
from based.ops.softmax_attention.reference import softmax_attention_reference


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_convolution_is_the_reference(width: int, length: int) -> None:
    projected = torch.randn(2, length, 12, dtype=torch.float64)
    weight = torch.randn(6, width, dtype=torch.float64)
    past = torch.randn(2, width - 1, 6, dtype=torch.float64)
    want = gated_short_convolution_reference(projected, weight, past)
    got = gated_short_convolution(projected, weight, past)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries", [4, 1000])
def test_softmax_attention_is_the_reference(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    monkeypatch.setattr(sdpa, "QUERIES", queries)
    q = torch.randn(3, 9, 2, 8, dtype=torch.float64)
    k, v = (torch.randn(3, 30, 2, 8, dtype=torch.float64) for _ in range(2))
    past = torch.tensor([0, 5, 21])
    want = softmax_attention_reference(q, k, v, past)
    torch.testing.assert_close(softmax_attention(q, k, v, past), want)
    fresh = softmax_attention(q, k[:, :9], v[:, :9])
    zero = torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(fresh, softmax_attention_reference(q, k, v, zero))


def test_rotary_scores_depend_on_distance_alone() -> None:
    frequencies = inverse_frequencies(16)
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64) for _ in range(2))

    def score(i: int, j: int) -> torch.Tensor:
        a = rotate(q, torch.tensor([[i]]), frequencies)
        return (a * rotate(k, torch.tensor([[j]]), frequencies)).sum()

    torch.testing.assert_close(score(7, 3), score(1_000_007, 1_000_003), rtol=1e-9, atol=1e-9)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_rotary_in_float32_is_exact_at_a_million() -> None:
    x, position = torch.randn(1, 1, 1, 8), torch.tensor([[1_000_003]])
    want = rotate(x.double(), position, inverse_frequencies(8))
    got = rotate(x, position, inverse_frequencies(8))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


def test_rotary_by_hand_half_of_the_head() -> None:
    x = torch.arange(8, dtype=torch.float64).reshape(1, 1, 1, 8)
    got = rotate(x, torch.tensor([[2]]), inverse_frequencies(8, fraction=0.5))[0, 0, 0]
    want = x[0, 0, 0].clone()
    for i, frequency in enumerate([1.0, 10000.0**-0.5]):
        c, s = math.cos(2 * frequency), math.sin(2 * frequency)
        want[i], want[i + 2] = c * i - s * (i + 2), c * (i + 2) + s * i
    torch.testing.assert_close(got, want)


def test_head_dim_70_at_one_half_rotates_36() -> None:
    """The official 1.3B Transformer's odd width: 18 frequencies with exponent 2i / 35."""
    frequencies = inverse_frequencies(70, fraction=0.5)
    assert frequencies.shape == (18,)
    assert frequencies[-1].item() == pytest.approx(10000 ** (-34 / 35))


def test_what_a_batch_s_boundaries_say_is_worked_out_once() -> None:
    """And anew where the boundaries are others, or may be."""
    asked = []

    @once_a_batch
    def lengths(cu_seqlens: Tensor, times: int) -> Tensor:
        asked.append(times)
        return times * cu_seqlens.diff()

    edges = torch.tensor([0, 2, 5])
    assert lengths(edges, 1) is lengths(edges, 1)
    assert lengths(edges, 2).tolist() == [4, 6]
    assert lengths(edges.clone(), 2).tolist() == [4, 6]
    assert asked == [1, 2, 2]
    edges[1] = 4
    assert lengths(edges, 2).tolist() == [8, 2]
    with torch.inference_mode():
        unseen = torch.tensor([0, 2, 5])
        assert lengths(unseen, 3).tolist() == [6, 9]
        unseen[1] = 1
        assert lengths(unseen, 3).tolist() == [3, 12]
    compiled = torch.compile(lambda x: lengths(x, 4), backend="eager", fullgraph=True)
    assert compiled(edges).tolist() == [16, 4]
    gone = weakref.ref(edges)
    del edges
    assert gone() is None


def test_packed_positions_and_ids_with_an_empty_sequence() -> None:
    edges = torch.tensor([0, 3, 3, 4, 7])
    assert sequence_ids(edges, 7).tolist() == [0, 0, 0, 2, 3, 3, 3]
    assert positions(edges, 7).tolist() == [0, 1, 2, 0, 0, 1, 2]
