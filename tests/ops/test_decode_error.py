"""A state kept for very long: rounding does not pile up."""

import pytest
import torch

from benchmarks.state_error import step_errors


@pytest.mark.parametrize("recent", [0, 16])
def test_the_error_of_a_float32_state_does_not_grow(recent: int) -> None:
    errors = step_errors([500, 8_000], torch.float32, recent)
    assert max(errors) < 2e-6


@pytest.mark.soak
def test_the_error_of_the_deferred_state_over_a_million_tokens() -> None:
    errors = step_errors([1_000, 1_000_000], torch.float32, 16)
    # A thousandth of what bfloat16 outputs resolve.
    assert max(errors) < 5e-6


def test_writing_a_bfloat16_state_every_token_loses_what_deferring_keeps() -> None:
    at_once = step_errors([4_000], torch.bfloat16, 0)[0]
    deferred = step_errors([4_000], torch.bfloat16, 16)[0]
    assert deferred < at_once / 2
