import pytest
import torch

from based.errors import BasedError
from based.recall import Probe, mqar, run_probe
from based.recall.mqar import IGNORE


def test_an_example_is_pairs_then_each_key_once_more() -> None:
    inputs, labels = mqar(50, 64, 8, vocab_size=100)
    assert inputs.shape == labels.shape == (50, 64)
    for row, answer in zip(inputs, labels, strict=True):
        keys, values = row[:16:2].tolist(), row[1:16:2].tolist()
        assert len(set(keys)) == len(set(values)) == 8
        assert all(1 <= key < 50 for key in keys)
        assert all(50 <= value < 100 for value in values)
        queried = (answer != IGNORE).nonzero().flatten()
        assert len(queried) == 8
        assert (queried >= 16).all()
        assert (queried % 2 == 0).all()
        found = {int(row[slot]): int(answer[slot]) for slot in queried}
        assert found == dict(zip(keys, values, strict=True))


def test_distances_follow_the_power_law() -> None:
    """One pair, so that its slot is one draw: P(slot) is proportional to (slot + 1)^-0.99."""
    _, labels = mqar(20000, 42, 1, vocab_size=64)
    slots = (labels != IGNORE).nonzero()[:, 1].sub(2) // 2
    weights = torch.arange(1, 21, dtype=torch.float64) ** -0.99
    want = weights / weights.sum()
    got = torch.bincount(slots, minlength=20).double() / 20000
    assert (got - want).abs().max() < 0.012


def test_other_tokens_are_uniform_and_a_seed_fixes_all() -> None:
    inputs, labels = mqar(2000, 64, 4, 32, generator=torch.Generator().manual_seed(1))
    filler = inputs[:, 8:][labels[:, 8:] == IGNORE]
    shares = torch.bincount(filler, minlength=32) / len(filler)
    assert (shares - 1 / 32).abs().max() < 0.005
    again, _ = mqar(2000, 64, 4, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(inputs, again)
    other, _ = mqar(2000, 64, 4, 32, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(inputs, other)


@pytest.mark.parametrize(
    ("length", "pairs", "vocabulary", "says"),
    [(30, 8, 64, "do not fit 30 tokens"), (400, 40, 64, "need a vocabulary of at least 82")],
)
def test_bad_sizes(length, pairs, vocabulary, says) -> None:
    with pytest.raises(BasedError, match=says):
        mqar(1, length, pairs, vocabulary)


def test_the_probe_tells_a_memory_from_none() -> None:
    """A window that sees the pairs solves a short task; one of a single key cannot."""
    probe = Probe(length=16, pairs=2, vocab_size=16, hidden_size=32, steps=150, batch_size=32)
    steps = []
    sees = probe.model_config("softmax_attention")
    blind = probe.model_config("sliding_window_attention", window=1)
    good = run_probe(probe, sees, lambda step, loss: steps.append(loss))
    bad = run_probe(probe, blind)
    assert len(steps) == 150
    assert good.accuracy > 0.8
    assert bad.accuracy < 0.5
    assert bad.state_bytes < good.state_bytes
    assert 0 < good.standard_error < 0.05
