"""docs/huggingface.md, every block in order, on a tiny model in the published one's place."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from based.cli import main
from based.data import train_tokenizer
from based.models import load_model

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = "hazyresearch/based-360m"


def published(folder: Path) -> None:
    """The official fixture with a vocabulary for text, under the published model's name."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer([PAGE.read_text()], 300)
    tokenizer.save(folder / "tokenizer.json")
    tensors = load_file(FIXTURES / "based.safetensors")
    embedding = "transformer.embeddings.word_embeddings.weight"
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    save_file({**tensors, embedding: torch.randn(304, 32)}, folder / "model.safetensors")
    values = json.loads((FIXTURES / "based_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 300}))


# The trainer's own advice on a machine without an accelerator.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_page_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    published(tmp_path / PUBLISHED)
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == [
        *("bash", "python", "python", "python", "bash"),
        *("yaml", "json", "python"),
    ]
    names: dict[str, object] = {}
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        elif kind == "bash":
            program, *arguments = shlex.split(text)
            assert program == "based"
            main(arguments)
        else:
            file = Path("tasks") / f"capitals.{ {'yaml': 'yaml', 'json': 'jsonl'}[kind] }"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    printed = capsys.readouterr().out
    model = load_model("tuned")
    assert f"{2 * model.state_bytes(0)} bytes for two texts" in printed
    assert "verified: " in printed
    assert "\nFellow citizens" in printed
    assert names["found"]["results"]["capitals"]["exact_match,none"] in (0.0, 0.5, 1.0)
    tuned = (model.state_dict(), load_model("based-360m").state_dict())
    assert any(not torch.equal(tuned[0][name], tuned[1][name]) for name in tuned[0])
