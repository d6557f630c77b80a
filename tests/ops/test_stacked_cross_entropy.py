import pytest
import torch
from torch import Tensor

from based.ops.stacked_cross_entropy import chunked, stacked_cross_entropy
from based.ops.stacked_cross_entropy.gradient import softmax_gradient_
from based.ops.stacked_cross_entropy.reference import stacked_cross_entropy_reference
from based.ops.stacked_cross_entropy.triton import softmax_gradient_kernel_

# Without a GPU the kernel is interpreted.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(dtype: torch.dtype = torch.float64, queries: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(3, queries, 8, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(3, 11, 8, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(11, (queries,), dtype=torch.int32)


@pytest.mark.parametrize("elements", [1, 33 * 5, 33 * 17, 1 << 20])
def test_chunks_are_the_reference(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", elements)
    hidden, head, answers = case()
    upstream = torch.randn(3, dtype=torch.float64)
    got = stacked_cross_entropy(hidden, head, answers)
    want = stacked_cross_entropy_reference(hidden, head, answers)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    got_gradients = torch.autograd.grad(got @ upstream, (hidden, head))
    want_gradients = torch.autograd.grad(want @ upstream, (hidden, head))
    for one, other in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_bfloat16_products_stay_close() -> None:
    hidden, head, answers = case(torch.float32, queries=50)
    losses, gradients = [], []
    for products in (torch.float32, torch.bfloat16):
        loss = stacked_cross_entropy(hidden, head, answers, products)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.sum(), (hidden, head)))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    for exact, rounded in zip(*gradients, strict=True):
        assert exact.dtype == rounded.dtype == torch.float32
        assert (exact - rounded).norm() < 0.02 * exact.norm()
        assert not torch.equal(exact, rounded)


def test_a_diverged_model_leaves_the_others_alone() -> None:
    hidden, head, answers = case()
    alone = stacked_cross_entropy(hidden[1:], head[1:], answers)
    with torch.no_grad():
        hidden[0, 3] = float("inf")
    losses = stacked_cross_entropy(hidden, head, answers)
    assert not losses[0].isfinite()
    assert torch.equal(losses[1:], alone)


@pytest.mark.parametrize("vocabulary", [11, 64])
def test_the_kernel_is_the_gradient(vocabulary: int) -> None:
    logits = 5 * torch.randn(2, 5, vocabulary)
    answers = torch.randint(vocabulary, (5,), dtype=torch.int32)
    mine = logits.clone().to(DEVICE)
    losses = softmax_gradient_kernel_(mine, answers.to(DEVICE), 0.2)
    torch.testing.assert_close(losses.cpu(), softmax_gradient_(logits, answers, 0.2))
    torch.testing.assert_close(mine.cpu(), logits, rtol=1e-5, atol=3e-7)
