import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from based.cli import main
from based.data import TokenDataset, Windows
from based.data.prepare import prepare
from based.errors import BasedError
from based.evaluation import Perplexity, Share, evaluate, paired_difference, recall_hits
from based.models import Decoder, preset, save_model

VOCABULARY = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("one two three, two three four; " * 300)
    prepare([folder / "a.txt"], folder / "out", VOCABULARY, validation_fraction=0.3)
    return folder / "out"


@pytest.fixture(scope="module")
def windows(data) -> Windows:
    return Windows(TokenDataset(data, "validation"), 24)


def model() -> Decoder:
    return Decoder(preset("based-tiny", vocab_size=VOCABULARY))


def test_recall_hits_are_repeated_bigrams() -> None:
    tokens = torch.randint(0, 5, (4, 60))
    hits = recall_hits(tokens, 5)
    for row, found in zip(tokens.tolist(), hits.tolist(), strict=True):
        seen: set[tuple[int, int]] = set()
        for bigram, hit in zip(pairwise(row), found, strict=True):
            assert hit == (bigram in seen)
            seen.add(bigram)
    assert hits.any()
    assert not hits.all()


def test_evaluation_is_the_mean_over_all_tokens_of_each_kind(windows) -> None:
    net = model()
    result = evaluate(net, windows, batch_size=3)
    text = windows.in_order(0, windows.count)
    with torch.no_grad():
        logits, _ = net(text[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
    hits = recall_hits(text, VOCABULARY)
    assert result.loss() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result.loss("hits") == pytest.approx(losses[hits].mean().item(), rel=1e-5)
    assert result.loss("rest") == pytest.approx(losses[~hits].mean().item(), rel=1e-5)
    assert result.share("hits") == pytest.approx(hits.double().mean().item())
    assert result.perplexity() == pytest.approx(math.exp(result.loss()))
    assert len(evaluate(net, windows, 4, max_windows=5).tokens) == 5


@pytest.mark.parametrize("ranks", [1, 3])
def test_batches_are_of_one_shape_and_count_each_window_once(windows, ranks, monkeypatch) -> None:
    net, shapes = model(), set()
    whole = evaluate(net, windows, batch_size=windows.count)
    loss = net.loss

    def seen(inputs, targets):
        shapes.add(tuple(inputs.shape))
        return loss(inputs, targets)

    monkeypatch.setattr(net, "loss", seen)
    size = 4 if windows.count % 4 else 5
    parts = [evaluate(net, windows, size, share=Share(rank, ranks)) for rank in range(ranks)]
    assert shapes == {(size, 24)}
    torch.testing.assert_close(sum(part.nll for part in parts), whole.nll)
    assert torch.equal(sum(part.tokens for part in parts), whole.tokens)


def test_standard_error_covers_the_truth_at_the_promised_rate() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        counts = torch.from_numpy(random.integers(20, 60, (50, 1))).double()
        noise = torch.from_numpy(random.normal(size=(50, 1)))
        nll = counts * (2.0 + 0.3 * noise)
        both = torch.cat([nll, nll], 1), torch.cat([counts, counts], 1)
        result = Perplexity(*both)
        covered += abs(result.loss() - 2.0) < 2 * result.standard_error()
    assert 0.91 < covered / 400 < 0.98


def test_paired_difference_sees_what_separate_errors_hide() -> None:
    tokens = torch.full((40, 2), 50.0, dtype=torch.float64)
    hard = torch.randn(40, 1, dtype=torch.float64) * 20 + 150
    a = Perplexity(hard + 2 + torch.randn(40, 2), tokens)
    b = Perplexity(hard + torch.randn(40, 2), tokens)
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(0.04, abs=0.01)
    assert not difference.within_noise
    assert a.standard_error() > 5 * difference.standard_error
    assert paired_difference(a, a).within_noise
    with pytest.raises(BasedError, match="not of the same windows"):
        paired_difference(a, Perplexity(b.nll[:5], tokens[:5]))


def test_command(data, tmp_path, capsys) -> None:
    save_model(model(), tmp_path / "m", data / "tokenizer.json")
    arguments = ["eval", str(tmp_path / "m"), "--data", str(data), "--length", "24"]
    main([*arguments, "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["perplexity_all"] == pytest.approx(VOCABULARY, rel=0.1)
    main(arguments)
    assert "recall hits" in capsys.readouterr().out
    save_model(Decoder(preset("based-tiny", vocab_size=200)), tmp_path / "small")
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "small"), "--data", str(data), "--length", "24"])
    assert "model's own tokenizer" in capsys.readouterr().err
