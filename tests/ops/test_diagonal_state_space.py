"""The diagonal state-space model: chunks and steps against the recurrence."""

import pytest
import torch
from torch import Tensor

from based.ops.diagonal_state_space import diagonal_state_space, diagonal_state_space_step
from based.ops.diagonal_state_space.reference import diagonal_state_space_reference


def make(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs, decays of modulus 0.3 to 1 at any angle, output weights, skips, and a state."""
    dtype = torch.float64
    x = torch.randn(2, length, 3, 4, dtype=dtype)
    modulus = 0.3 + 0.699 * torch.rand(3, 5, dtype=dtype)
    decay = torch.polar(modulus, 6.3 * torch.rand(3, 5, dtype=dtype))
    output = torch.view_as_complex(torch.randn(3, 5, 2, dtype=dtype))
    skip = torch.randn(3, dtype=dtype)
    return x, decay, output, skip, torch.randn(2, 3, 4, 5, 2, dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_chunked_is_the_recurrence(length: int) -> None:
    arguments = make(length)
    got, want = diagonal_state_space(*arguments), diagonal_state_space_reference(*arguments)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_without_a_final_state() -> None:
    x, decay, output, skip, state = make(130)
    want, _ = diagonal_state_space_reference(x, decay, output, skip, state)
    got, nothing = diagonal_state_space(x, decay, output, skip, state, final_state=False)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert nothing is None


def test_gradients_are_the_recurrences() -> None:
    arguments = [x.requires_grad_() for x in make(70)]
    want = diagonal_state_space_reference(*arguments)
    weights = [torch.randn_like(x) for x in want]
    expected = torch.autograd.grad(want, arguments, weights)
    got = torch.autograd.grad(diagonal_state_space(*arguments), arguments, weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_steps_are_the_recurrence() -> None:
    x, decay, output, skip, state = make(20)
    want, after = diagonal_state_space_reference(x, decay, output, skip, state)
    for t in range(20):
        got = diagonal_state_space_step(x[:, t], decay, output, skip, state)
        torch.testing.assert_close(got, want[:, t])
    torch.testing.assert_close(state, after)


def test_float32_over_a_slow_decay() -> None:
    """A thousand tokens at modulus 0.9995, the slowest that H3 begins with."""
    x, decay, output, skip, state = make(1000)
    decay = decay / decay.abs() * 0.9995
    want, _ = diagonal_state_space_reference(x, decay, output, skip, state)
    system = decay.to(torch.complex64), output.to(torch.complex64), skip.float()
    got, _ = diagonal_state_space(x.float(), *system, state.float())
    assert (got.double() - want).norm() / want.norm() < 2e-5
