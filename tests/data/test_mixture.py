import numpy as np
import pytest
import torch

from based.data import Mixture, TokenDataset, Windows
from based.data.mixture import BLOCK, _apportion
from based.data.packing import document_bounds
from based.data.prepare import prepare
from based.errors import BasedError


@pytest.fixture
def parts(tmp_path) -> list[Windows]:
    tokenizer = None
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 900)
        prepare([tmp_path / f"{name}.txt"], tmp_path / name, 300, tokenizer=tokenizer)
        tokenizer = TokenDataset(tmp_path / "a").tokenizer()
    return [Windows(TokenDataset(tmp_path / name), length=8, seed=1) for name in "abc"]


def test_each_directory_has_its_share_and_its_own_order(parts) -> None:
    mixture = Mixture(parts, [0.5, 0.3, 0.2], seed=5)
    drawn = mixture.batch(0, 2 * BLOCK)
    decode = parts[0].dataset.tokenizer().decode
    texts = [decode(row.tolist()) for row in drawn]
    for letter, part, share in zip("abc", parts, (0.5, 0.3, 0.2), strict=True):
        rows = drawn[torch.tensor([letter in text for text in texts])]
        assert len(rows) == pytest.approx(2 * BLOCK * share, abs=2)
        assert torch.equal(rows, part.batch(0, len(rows)))
    again = Mixture(parts, [0.5, 0.3, 0.2], seed=5)
    assert torch.equal(again.batch(BLOCK - 3, 7), drawn[BLOCK - 3 : BLOCK + 4])
    assert not torch.equal(Mixture(parts, [0.5, 0.3, 0.2], seed=6).batch(0, 99), drawn[:99])
    assert mixture.count == sum(part.count for part in parts)


def test_shares_fill_a_block_whatever_they_are() -> None:
    for weights in ([1.0], [0.9999, 0.0001], [1 / 3] * 3, [1e-6] * 5 + [1 - 5e-6]):
        counts = _apportion(weights)
        assert sum(counts) == BLOCK
        assert min(counts) >= 1
        assert np.abs(np.array(counts) / BLOCK - weights).max() < 6 / BLOCK


def test_bad_mixtures(parts, tmp_path) -> None:
    for weights in ([0.5, 0.5, 0.5], [1.2, -0.4, 0.2]):
        with pytest.raises(BasedError, match="shares of the data directories"):
            Mixture(parts, weights)
    (tmp_path / "d.txt").write_text("other text " * 300)
    prepare([tmp_path / "d.txt"], tmp_path / "d", 290)
    other = Windows(TokenDataset(tmp_path / "d"), length=8)
    with pytest.raises(BasedError, match="another tokenizer"):
        Mixture([parts[0], other], [0.5, 0.5])


def test_documents_begin_at_their_end_of_text_token() -> None:
    tokens = torch.tensor([[5, 9, 6, 7, 9], [9, 9, 5, 5, 5]])
    bounds = document_bounds(tokens, end_of_text=9)
    assert bounds.tolist() == [0, 1, 4, 5, 6, 10, 10, 10]
    assert document_bounds(tokens[:1, :1], 9).tolist() == [0, 1]


def test_an_id_that_is_no_token_is_refused(parts) -> None:
    shard = parts[0].dataset.path / "train-00000.npy"
    array = np.load(shard)
    array[100] = 60000
    np.save(shard, array)
    damaged = TokenDataset(parts[0].dataset.path)
    with pytest.raises(BasedError, match=r"train-00000.npy is damaged: it holds token 60000"):
        damaged.read(90, 20)
