import subprocess
import sys
import time

import pytest
import torch

from based.cli import VERBS, main
from based.data import train_tokenizer
from based.models import Decoder, preset, save_model


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "based", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_help_loads_nothing_heavy_and_answers_at_once() -> None:
    script = (
        "import sys; from based.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - began)
    assert done.stdout.endswith("[]\n")
    assert all(f"  {verb}" in done.stdout for verb in VERBS)
    assert min(times) < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"based {verb}" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path, capsys) -> None:
    for arguments, says in (
        (["fly"], "no verb 'fly'"),
        (["info", "based-9b"], "no preset is named 'based-9b'"),
        (["info", "based-360m", "--window", "0"], "window is 0"),
        (["info", "attn-360m", "--budget", "1MB"], "no dials"),
        (["generate", str(tmp_path / "none"), "--prompt", "a"], "there is no"),
        (["generate", str(tmp_path)], "config.json is missing"),
        (["train", str(tmp_path / "r"), "--data", str(tmp_path)], "no token shards"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        printed = capsys.readouterr()
        assert stopped.value.code in (1, 2)
        assert printed.out == ""
        assert says in printed.err
        assert printed.err.startswith("based: ")
        assert printed.err.count("\n") == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["fellow citizens of the senate " * 20], 280)
    tokenizer.save(folder / "tokenizer.json")
    model = Decoder(preset("based-tiny", vocab_size=tokenizer.vocab_size))
    save_model(model, folder / "m", folder / "tokenizer.json")
    return folder / "m"


def test_generate_reads_prompt_file_or_standard_input(saved, tmp_path, capsys) -> None:
    (tmp_path / "p.txt").write_text("fellow")
    options = ["generate", str(saved), "--max-new-tokens", "8", "--seed", "7"]
    main([*options, "--prompt", "fellow"])
    first = capsys.readouterr().out
    main([*options, "--file", str(tmp_path / "p.txt")])
    assert capsys.readouterr().out == first
    done = run(*options, text="fellow")
    assert done.stdout == first
    assert first.startswith("fellow")
    main([*options[:-1], "8", "--prompt", "fellow"])
    assert capsys.readouterr().out != first


def test_generate_on_odd_prompts(saved, capsys) -> None:
    main(["generate", str(saved), "--prompt", "", "--max-new-tokens", "5"])
    assert capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["generate", str(saved), "--prompt", "word " * 50, "--max-prompt-tokens", "20"])
    assert "the prompt has" in capsys.readouterr().err


def test_generate_with_eight_bit_weights(saved, capsys) -> None:
    """In a process of its own: one that is read quietly, and changes little."""
    options = ("generate", str(saved), "--prompt", "fellow", "--temperature", "0")
    main([*options, "--max-new-tokens", "4"])
    want = capsys.readouterr().out
    done = run(*options, "--max-new-tokens", "4", "--quantize", "int8")
    assert (done.stdout, done.stderr) == (want, "")


def test_info(saved, capsys) -> None:
    main(["info", "based-360m"])
    out = capsys.readouterr().out
    for number in ("362,620,928", "taylor_linear_attention", "1M"):
        assert number in out
    main(["info", "based-360m", "--budget", "3MB"])
    assert "feature_dim" in capsys.readouterr().out
    main(["info", str(saved)])
    assert "sliding_window_attention" in capsys.readouterr().out
