"""The window: its conventions, and the blocked form against the reference."""

import pytest
import torch
from torch.nn import functional as F

from based.ops.sliding_window_attention import sliding_window_attention, window_from_official
from based.ops.sliding_window_attention.reference import sliding_window_attention_reference


def make(batch: int, length: int, past: int = 0) -> tuple[torch.Tensor, ...]:
    q = torch.randn(batch, length, 2, 8, dtype=torch.float64)
    k, v = (torch.randn(batch, past + length, 2, 8, dtype=torch.float64) for _ in range(2))
    return q, k, v


def test_a_query_sees_exactly_window_keys_itself_included() -> None:
    q, k, v = make(1, 40)
    v = v.requires_grad_()
    out = sliding_window_attention(q, k, v, window=5)
    (gradient,) = torch.autograd.grad(out[0, 20].sum(), v)
    seen = gradient[0].abs().sum((-1, -2)).nonzero()[:, 0].tolist()
    assert seen == [16, 17, 18, 19, 20]


def test_official_window_size_means_half_of_it_and_itself() -> None:
    assert [window_from_official(w) for w in (256, 128, 64)] == [129, 65, 33]


def test_hugging_face_sliding_window_is_ours() -> None:
    masking_utils = pytest.importorskip("transformers.masking_utils")
    overlay = masking_utils.sliding_window_overlay(5)
    assert [key for key in range(40) if overlay(0, 0, 20, key) and key <= 20] == [
        16,
        17,
        18,
        19,
        20,
    ]


@pytest.mark.parametrize("window", [1, 2, 16, 63, 64, 65, 300])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 200])
def test_blocked_is_the_reference(window: int, length: int) -> None:
    q, k, v = make(2, length)
    want = sliding_window_attention_reference(q, k, v, window)
    torch.testing.assert_close(sliding_window_attention(q, k, v, window), want)


@pytest.mark.parametrize("past", [0, 3, 15, 40])
def test_past_keys_of_which_some_do_not_exist(past: int) -> None:
    q, k, v = make(3, 100, past)
    exist = torch.tensor([0, past // 2, past])
    want = sliding_window_attention_reference(q, k, v, 16, exist)
    torch.testing.assert_close(sliding_window_attention(q, k, v, 16, exist), want)


def test_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in make(1, 9, 3))
    assert torch.autograd.gradcheck(lambda q, k, v: sliding_window_attention(q, k, v, 4), (q, k, v))


def test_a_window_of_everything_is_causal_attention() -> None:
    q, k, v = make(2, 50)
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(sliding_window_attention(q, k, v, 50), want)


@pytest.mark.parametrize("head_dim", [64, 112])
def test_bfloat16(head_dim: int) -> None:
    q, k, v = (torch.randn(1, 300, 2, head_dim).bfloat16() for _ in range(3))
    got = sliding_window_attention(q, k, v, 65)
    want = sliding_window_attention_reference(q.double(), k.double(), v.double(), 65)
    assert (got.double() - want).norm() / want.norm() < 6e-3
