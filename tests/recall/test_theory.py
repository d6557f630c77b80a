"""The lower bound as a protocol, and a Based with weights set by hand."""

from math import comb, factorial, log2

import pytest
import torch

from based.cli import main
from based.errors import BasedError
from based.recall.theory import (
    HandBuiltBased,
    attention_distance,
    guaranteed_pairs,
    index_protocol,
    lower_bound_bits,
    near_orthogonal,
    quantised,
    recalled,
    sign_codes,
    taylor_error,
)


def test_mqar_solves_index() -> None:
    """Bob names every bit of every word from Alice's state alone."""
    model = HandBuiltBased(8, 2, feature_dim=8, value_dim=1)
    for word in (0, 255, *torch.randint(256, (6,)).tolist()):
        bits = torch.tensor([word >> i & 1 for i in range(8)], dtype=torch.bool)
        for index in range(8):
            answer, message = index_protocol(model, bits, index)
            assert answer == bits[index]
    assert sum(state.nbytes for state in message) * 8 == model.state_bits()
    assert model.state_bits() >= lower_bound_bits(8, 8)


def test_the_message_is_all_that_bob_has() -> None:
    """Two words that differ in one bit leave different states; the same state, the same answers."""
    model = HandBuiltBased(6, 2, feature_dim=8, value_dim=1)
    one = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    other = one.clone()
    other[3] = False
    (_, a), (_, b) = index_protocol(model, one, 0), index_protocol(model, other, 0)
    assert (a[1]["numerator"] - b[1]["numerator"]).abs().max() > 0.5


def test_pairs_are_recalled_exactly_up_to_the_capacity() -> None:
    """Orthonormal keys: all of them; the guarantee holds for the worst bits; then it breaks."""
    assert recalled(HandBuiltBased(8, 4096, 8, 16), 8, trials=10) == 1.0
    crowded = HandBuiltBased(24, 2, feature_dim=8, value_dim=1)
    sure = guaranteed_pairs(crowded)
    assert 8 <= sure < 24
    for _ in range(20):
        bits = torch.rand(sure) < 0.5
        assert all(index_protocol(crowded, bits, i)[0] == bits[i] for i in range(sure))
    assert recalled(HandBuiltBased(128, 4096, 8, 16), 128, trials=3) < 0.2


def test_the_state_does_not_depend_on_how_much_it_holds() -> None:
    few, many = (HandBuiltBased(n, 16, 4, 4) for n in (2, 40))
    assert few.state_bits() == many.state_bits()


def test_a_rounded_state_recalls_less_and_less() -> None:
    model = HandBuiltBased(16, 4096, 8, 16)
    shares = [recalled(model, 16, trials=5, bits=bits) for bits in (8, 4, 2)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[2] < 1.0
    states = model.read(torch.arange(10)[None], model.init_state(1))[1]
    rounded = quantised(states, 4)[1]["numerator"]
    assert max(len(row.unique()) for row in rounded.flatten(0, -2)) <= 15


def test_the_bound_counts_assignments() -> None:
    assert lower_bound_bits(3, 8) == pytest.approx(log2(factorial(3) * comb(8, 3)))
    assert lower_bound_bits(10, 2**12, accuracy=0.9) < lower_bound_bits(10, 2**12)
    assert lower_bound_bits(100, 128, accuracy=1 / 128) == pytest.approx(0.0, abs=0.2)


def test_codes() -> None:
    torch.testing.assert_close(
        near_orthogonal(5, 8) @ near_orthogonal(5, 8).T, torch.eye(5).double()
    )
    crowded, random = near_orthogonal(20, 8), torch.randn(20, 8, dtype=torch.float64)
    random = random / random.norm(dim=1, keepdim=True)
    assert crowded.norm(dim=1).allclose(torch.ones(20, dtype=torch.float64))

    def worst(codes: torch.Tensor) -> float:
        return (codes @ codes.T - torch.eye(20)).abs().max().item()

    # No 20 unit vectors in 8 dimensions do better than Welch's bound.
    assert (12 / (8 * 19)) ** 0.5 <= worst(crowded) < 0.8 * worst(random)
    assert len(sign_codes(4096, 12).unique(dim=0)) == 4096
    with pytest.raises(BasedError, match="17 values need a head_dim of at least 5"):
        sign_codes(17, 4)


def test_taylor_against_softmax() -> None:
    s = torch.tensor(-0.5, dtype=torch.float64)
    assert taylor_error(0.5) == pytest.approx(float((1 + s + s**2 / 2) / s.exp() - 1))
    distances = [attention_distance(largest) for largest in (0.1, 0.5, 2.0)]
    assert distances == sorted(distances)
    assert distances[0] < 1e-4
    assert distances[2] > 0.05


def test_the_command_shows_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recall", "capacity", "--pairs", "4", "12", "--trials", "2"])
    shown = capsys.readouterr().out
    assert "bits" in shown
    assert "100.0%" in shown
    assert "distance to softmax" in shown
