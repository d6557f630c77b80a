"""Where text comes from: files in several processes, Hugging Face datasets."""

import json

import numpy as np
import pytest

from based.cli import main
from based.data import TokenDataset
from based.data.documents import Piece
from based.data.hub import HubDataset
from based.data.prepare import prepare
from based.errors import BasedError

TEXTS = [f"document {i}: the quick brown fox\r\n" * (1 + i % 7) for i in range(90)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "files" / "train.jsonl").write_text(lines)
    return tmp_path


def tokens(path) -> np.ndarray:
    splits = (TokenDataset(path, split) for split in ("train", "validation"))
    return np.concatenate([dataset.read(0, len(dataset)) for dataset in splits])


def test_processes_write_what_one_process_writes(folder) -> None:
    for processes in (1, 2):
        prepare([folder / "files"], folder / str(processes), 300, processes=processes)
    assert (tokens(folder / "1") == tokens(folder / "2")).all()
    with pytest.raises(BasedError, match="processes is 0"):
        prepare([folder / "files"], folder / "0", 300, processes=0)


def test_a_dataset_gives_what_its_files_give(folder, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    prepare([folder / "files"], folder / "plain", 300)
    name = str(folder / "files")
    for streaming in (True, False):
        source = HubDataset(name, streaming=streaming)
        assert list(source.read()) == [Piece(text, ends_document=True) for text in TEXTS]
    arguments = ["data", str(folder / "streamed"), "--dataset", name, "--vocab-size", "300"]
    main(arguments)
    assert (tokens(folder / "plain") == tokens(folder / "streamed")).all()

    import datasets

    rows = datasets.Dataset.from_dict({"body": TEXTS})
    rows.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(folder / "several"))
    for saved in ("saved", "several"):
        source = HubDataset(str(folder / saved), field="body")
        assert [piece.text for piece in source.read()] == TEXTS
    for source, says in (
        (HubDataset(str(folder / "saved")), "no text column 'text'; its columns are body"),
        (HubDataset(str(folder / "several"), split="test"), "could not read dataset"),
        (HubDataset(str(folder / "missing")), "could not read dataset"),
    ):
        with pytest.raises(BasedError, match=says):
            list(source.read())


def test_files_and_a_dataset_do_not_go_together(folder, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["data", str(folder / "out"), str(folder / "files"), "--dataset", "name"])
    assert "not both" in capsys.readouterr().err
