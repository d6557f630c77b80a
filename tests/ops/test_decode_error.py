"""A state kept for very long: rounding does not pile up."""

import pytest

from benchmarks.state_error import Stored, step_errors


@pytest.mark.parametrize("recent", [0, 16])
def test_the_error_of_a_float32_state_does_not_grow(recent: int) -> None:
    errors = step_errors([500, 8_000], "float32", recent)
    assert max(errors) < 2e-6


def test_reading_upper_halves_costs_less_than_bfloat16_outputs() -> None:
    early, late = step_errors([500, 8_000], "halves", 16)
    # Storing these outputs in bfloat16 costs 1.7e-3.
    assert 1e-4 < early < 1.6e-3
    assert late < 1.6e-3


@pytest.mark.soak
@pytest.mark.parametrize(("stored", "limit"), [("float32", 5e-6), ("halves", 1.6e-3)])
def test_the_error_of_the_deferred_state_over_a_million_tokens(
    stored: Stored, limit: float
) -> None:
    """A thousandth of what bfloat16 outputs resolve, or as much as they do."""
    assert max(step_errors([1_000, 1_000_000], stored, 16)) < limit


def test_writing_a_bfloat16_state_every_token_loses_what_deferring_keeps() -> None:
    at_once = step_errors([4_000], "bfloat16", 0)[0]
    deferred = step_errors([4_000], "bfloat16", 16)[0]
    assert deferred < at_once / 2
