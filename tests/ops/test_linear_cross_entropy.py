import pytest
import torch

from based.ops.linear_cross_entropy import chunked, linear_cross_entropy
from based.ops.linear_cross_entropy.reference import linear_cross_entropy_reference


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("elements", [1, 600, 1 << 28])
def test_equals_the_reference_with_gradients(tokens, elements, monkeypatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", elements)
    hidden = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (tokens,))
    want = linear_cross_entropy_reference(hidden, weight, targets)
    total, losses = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(losses, want)
    torch.testing.assert_close(total, want.sum())
    assert not losses.requires_grad
    got = torch.autograd.grad(total * 0.3, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(want.sum() * 0.3, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets)[1], want)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision(dtype, tolerance) -> None:
    hidden, weight = torch.randn(40, 16).to(dtype), torch.randn(90, 16).to(dtype)
    targets = torch.randint(90, (40,))
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = linear_cross_entropy_reference(*wide, targets)
    total, losses = linear_cross_entropy(*inputs, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), want, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(total, inputs)
    for a, b in zip(got, torch.autograd.grad(want.sum(), wide), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary() -> None:
    hidden, targets = torch.randn(500, 8, requires_grad=True), torch.randint(20, (500,))
    kept = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        linear_cross_entropy(hidden, torch.randn(3000, 8, requires_grad=True), targets)
    assert sum(kept) == 500 * 8 + 3000 * 8


@pytest.mark.gpu
def test_on_a_gpu_with_chunks_of_several_sizes(monkeypatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1 << 26)
    hidden, weight = (torch.randn(n, 256, device="cuda") for n in (3000, 50264))
    targets = torch.randint(50264, (3000,), device="cuda")
    inputs = [(x / 8).bfloat16().requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = linear_cross_entropy_reference(*wide, targets)
    total, losses = linear_cross_entropy(*inputs, targets)
    torch.testing.assert_close(losses.double(), want, rtol=1e-2, atol=1e-2)
    got = torch.autograd.grad(total, inputs)
    for a, b in zip(got, torch.autograd.grad(want.sum(), wide), strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()
