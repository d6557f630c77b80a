import json
import lzma

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from based.data import StreamDecoder, TokenDataset, Tokenizer, Windows, train_tokenizer
from based.data import documents as documents_module
from based.data import shards as shards_module
from based.data.documents import CORPUS, read_pieces
from based.data.prepare import prepare
from based.errors import BasedError

TEXT = "The quick brown fox. Über die Brücke, 東京 🦊!\n\n  indented\tand tabbed\r\n" * 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 400)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_round_trip(tokenizer, text) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    decoder = StreamDecoder(tokenizer)
    assert "".join([decoder.feed(token) for token in ids] + [decoder.flush()]) == text


def test_a_special_token_in_text_is_text(tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_the_stream_holds_back_half_a_character(tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    by_byte = {tokenizer.token_bytes(i): i for i in range(257)}
    fed = [decoder.feed(by_byte[bytes([byte])]) for byte in "🦊".encode()]
    assert fed == ["", "", "", "🦊"]
    decoder.feed(by_byte[b"\xf0"])
    assert decoder.flush() == "\ufffd"


def test_saved_and_loaded(tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)


def test_bad_tokenizers(tmp_path) -> None:
    with pytest.raises(BasedError, match="at least 257"):
        train_tokenizer([TEXT], 256)
    with pytest.raises(BasedError, match="there is no tokenizer"):
        Tokenizer.load(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BasedError, match="not a tokenizer file"):
        Tokenizer.load(tmp_path / "bad.json")


def test_packing_keeps_every_document(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 500)
    texts = [f"document {i}: " + TEXT[: 20 * i] for i in range(30)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "b.txt").write_text("one more\r\n", newline="")
    packed = prepare([tmp_path], tmp_path / "out", 300, validation_fraction=0.2)
    assert packed.documents == 31
    found = []
    for split in ("train", "validation"):
        dataset = TokenDataset(tmp_path / "out", split)
        assert len(dataset) == packed.tokens[split]
        tokens = dataset.read(0, len(dataset)).tolist()
        text = dataset.tokenizer().decode(tokens)
        found += text.split("<|endoftext|>")[:-1]
    assert sorted(found) == sorted([*texts, "one more\r\n"])
    assert len(list((tmp_path / "out").glob("train-*.npy"))) > 2


def test_reads_across_shards(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 100)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": TEXT[i : i + 90]}) + "\n" for i in range(50))
    )
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", 300)
    dataset = TokenDataset(tmp_path / "out")
    whole = dataset.read(0, len(dataset))
    for start, count in ((0, 5), (95, 300), (len(dataset) - 7, 7), (3, 0)):
        assert (dataset.read(start, count) == whole[start : start + count]).all()
    with pytest.raises(IndexError):
        dataset.read(len(dataset) - 3, 4)


def test_a_long_document_is_read_in_pieces(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 100)
    (tmp_path / "long.txt").write_text(TEXT, newline="")
    pieces = list(read_pieces(tmp_path / "long.txt"))
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == TEXT
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_single_document_is_divided_at_its_end(tmp_path) -> None:
    (tmp_path / "book.txt").write_text(TEXT, newline="")
    packed = prepare([tmp_path / "book.txt"], tmp_path / "out", 300, validation_fraction=0.1)
    share = packed.tokens["validation"] / sum(packed.tokens.values())
    assert share == pytest.approx(0.1, abs=0.01)
    both = [TokenDataset(tmp_path / "out", split) for split in ("train", "validation")]
    tokens = np.concatenate([dataset.read(0, len(dataset)) for dataset in both])
    assert both[0].tokenizer().decode(tokens.tolist()) == TEXT + "<|endoftext|>"


def test_windows_cover_an_epoch_once_and_depend_on_nothing_else(tmp_path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    prepare([tmp_path / "a.txt"], tmp_path / "out", 300)
    dataset = TokenDataset(tmp_path / "out")
    windows = Windows(dataset, length=16, seed=3)
    epoch = windows.batch(0, windows.count)
    assert epoch.shape == (windows.count, 17)
    starts = sorted(windows._shuffled(i) for i in range(windows.count))
    assert np.diff(starts).tolist() == [16] * (windows.count - 1)
    again = Windows(dataset, length=16, seed=3)
    later = torch.cat([again.batch(i, 1) for i in range(windows.count - 3, windows.count + 3)])
    assert torch.equal(later, windows.batch(windows.count - 3, 6))
    assert not torch.equal(epoch, windows.batch(windows.count, windows.count))
    assert not torch.equal(epoch, Windows(dataset, length=16, seed=4).batch(0, windows.count))
    whole = torch.from_numpy(dataset.read(0, len(dataset)))
    rows = windows.in_order(windows.count - 2, 9)
    assert len(rows) == 2
    assert torch.equal(rows[0], whole[(windows.count - 2) * 16 :][:17])


def bad_files(folder):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "cut.txt.xz").write_bytes(lzma.compress(TEXT.encode())[:-20])
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"txet": "no"}\n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    (folder / "empty.txt").write_text("")
    (folder / "nothing").mkdir()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("latin.txt", "not UTF-8"),
        ("cut.txt.xz", "could not read"),
        ("bad.jsonl", "line 2"),
        ("number.jsonl", "not a string"),
        ("empty.txt", "no text to speak of"),
        ("nothing", "no files"),
        ("missing", "no file or directory"),
    ],
)
def test_bad_files_leave_nothing_behind(tmp_path, name, says) -> None:
    bad_files(tmp_path)
    with pytest.raises(BasedError, match=says):
        prepare([tmp_path / name], tmp_path / "out", 300)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_corpus_of_one_token_is_one_clear_line(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a")
    prepare([tmp_path / "a.txt"], tmp_path / "out", 300)
    with pytest.raises(BasedError, match=r"has 1 tokens, fewer than the 9"):
        Windows(TokenDataset(tmp_path / "out"), length=8)


def test_a_bit_that_changed_is_found_where_it_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shards_module, "BLOCK_TOKENS", 10)
    (tmp_path / "a.txt").write_text(TEXT)
    prepare([tmp_path / "a.txt"], tmp_path / "out", 300)
    before = TokenDataset(tmp_path / "out").read(0, 60)
    shard = tmp_path / "out" / "train-00000.npy"
    array = np.load(shard)
    array[35] ^= 1
    np.save(shard, array)
    damaged = TokenDataset(tmp_path / "out")
    assert (damaged.read(0, 30) == before[:30]).all()
    assert (damaged.read(40, 20) == before[40:]).all()
    with pytest.raises(BasedError, match=r"train-00000.npy is damaged: .* 10 tokens from 30 on"):
        damaged.read(25, 10)
    # Shards of earlier versions have no checksums, and are read as they are.
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    for split in meta["splits"].values():
        for described in split["shards"]:
            del described["crc32"]
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta))
    assert (TokenDataset(tmp_path / "out").read(0, 60) != before).sum() == 1


def test_damaged_shards(tmp_path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    prepare([tmp_path / "a.txt"], tmp_path / "out", 300)
    shard = tmp_path / "out" / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(BasedError, match="damaged"):
        TokenDataset(tmp_path / "out")
    with pytest.raises(BasedError, match="no split 'test'"):
        TokenDataset(tmp_path / "out", "test")
    with pytest.raises(BasedError, match="no token shards"):
        TokenDataset(tmp_path)


def test_the_shipped_corpus_is_what_its_source_says() -> None:
    pieces = list(read_pieces(CORPUS))
    assert len(pieces) == 233
    assert sum(len(piece.text.encode()) for piece in pieces) == 10_761_158
