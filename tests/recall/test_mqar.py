from dataclasses import replace

import pytest
import torch

from based.errors import BasedError
from based.recall import Probe, mqar, run_probe
from based.recall.config import LEARNING_RATES, TEST, TRAIN, Recipe
from based.recall.data import Data
from based.recall.mqar import IGNORE, Task, segment


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


def test_the_published_segments() -> None:
    assert [(t.length, t.pairs, t.examples) for t in TRAIN] == [
        (64, 4, 100_000),
        (128, 8, 20_000),
        (256, 16, 20_000),
        (256, 32, 20_000),
        (256, 64, 20_000),
    ]
    assert [(t.length, t.pairs) for t in TEST] == [
        *((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    ]
    assert {t.examples for t in TEST} == {1000}
    rates = [f"{rate:.2e}" for rate in LEARNING_RATES]
    assert rates == ["1.00e-03", "3.16e-03", "1.00e-02", "3.16e-02"]


def test_a_segment_asks_each_key_once_and_in_place() -> None:
    part = segment(Task(256, 64, 300), seed=3)
    assert part.tokens.dtype == torch.int32
    assert part.tokens.shape == (300, 256)
    keys, values = part.tokens[:, 0:128:2], part.tokens[:, 1:128:2]
    assert torch.equal(part.tokens.gather(1, part.positions.long()), keys)
    assert torch.equal(part.answers, values)
    assert ((keys >= 1) & (keys < 4096)).all()
    assert ((values >= 4096) & (values < 8192)).all()
    for drawn in (keys, values, part.positions):
        assert (drawn.sort(dim=1).values.diff(dim=1) > 0).all()


def test_keys_and_values_are_uniform_over_their_halves() -> None:
    """Each of 15 keys and 16 values as often, at the first place and at the last."""
    part = segment(Task(32, 8, 30_000), 32, seed=0)
    for drawn, first, choices in ((part.tokens[:, :16:2], 1, 15), (part.answers, 16, 16)):
        for place in (0, 7):
            shares = torch.bincount(drawn[:, place] - first, minlength=choices) / 30_000
            assert len(shares) == choices
            assert (shares - 1 / choices).abs().max() < 0.006


def test_slots_without_replacement_follow_sequential_draws() -> None:
    """Two pairs in three slots: P(i then j) = p_i p_j / (1 - p_i), p by the power law."""
    part = segment(Task(10, 2, 40_000), 16, seed=0)
    slots = (part.positions.long() - 4) // 2
    weights = torch.arange(1, 4, dtype=torch.float64) ** -0.99
    p = weights / weights.sum()
    for i, j in ((0, 1), (1, 0), (0, 2), (2, 1)):
        share = ((slots[:, 0] == i) & (slots[:, 1] == j)).double().mean()
        assert abs(share - p[i] * p[j] / (1 - p[i])) < 0.01


def test_a_small_vocabulary_can_be_used_up() -> None:
    """As many pairs as there are keys: every row is a permutation of all."""
    part = segment(Task(32, 7, 50), 16, seed=0)
    assert torch.equal(part.tokens[:, :14:2].sort(dim=1).values[0], torch.arange(1, 8).int())


RECIPE = Recipe(
    vocab_size=32,
    train=(Task(16, 2, 70), Task(32, 4, 30)),
    test=(Task(16, 2, 20),),
    batch_size=32,
)


def shapes(batches) -> list[tuple[int, int]]:
    return [tuple(batch.tokens.shape) for batch in batches]


def test_every_epoch_is_the_same_and_in_segment_order() -> None:
    data = Data(RECIPE, torch.device("cpu"))
    assert shapes(data.epoch(0)) == [(32, 16), (32, 16), (6, 16), (30, 32)]
    for one, other in zip(data.epoch(0), data.epoch(5), strict=True):
        assert torch.equal(one.tokens, other.tokens)
    test = data.test[0].tokens
    assert not (data.train[0].tokens[:20] == test).all(dim=1).any()


def test_fresh_data_and_shuffling_are_options() -> None:
    fresh = Data(replace(RECIPE, fresh_data=True), torch.device("cpu"))
    first, second = ([b.tokens for b in fresh.epoch(e)] for e in (0, 1))
    assert [t.shape for t in first] == [t.shape for t in second]
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    mixed = Data(replace(RECIPE, shuffle=True), torch.device("cpu"))
    orders = [shapes(mixed.epoch(e)) for e in range(4)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    rows = torch.cat([b.tokens for b in mixed.epoch(1) if b.tokens.shape[1] == 16])
    assert torch.equal(rows.unique(dim=0), mixed.train[0].tokens.unique(dim=0))


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
