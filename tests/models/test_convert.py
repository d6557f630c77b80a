"""Official checkpoints converted: the official code's numbers, every form, every mistake."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from based.cli import main
from based.data import train_tokenizer
from based.errors import BasedError
from based.models import Decoder, load_model, preset
from based.models.checkpoint import decoder
from based.models.convert import Source, convert, gpt
from based.models.convert.verify import verify
from based.models.skeleton import skeleton

FIXTURES = Path(__file__).parent / "fixtures"
EMBEDDING, HEAD = "transformer.embeddings.word_embeddings.weight", "lm_head.weight"


def weights(kind: str) -> dict[str, torch.Tensor]:
    """The fixture's state dict in float32, with the tied head."""
    tensors = {n: t.float() for n, t in load_file(FIXTURES / f"{kind}.safetensors").items()}
    return tensors | {HEAD: tensors[EMBEDDING]}


def configuration(kind: str) -> dict[str, Any]:
    return json.loads((FIXTURES / f"{kind}_config.json").read_text())


def write(folder: Path, kind: str = "based", **changes: Any) -> Path:
    """A checkpoint as the official training writes it; `changes` go into its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": tensor for name, tensor in weights(kind).items()}
    state["train_metrics.num-tokens.count"] = torch.tensor(7)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(configuration(kind) | changes))
    return folder


def converted(folder: Path) -> Decoder:
    return convert(Source(str(folder)))[0]


# The proof


@pytest.mark.parametrize("kind", ["based", "attn"])
@torch.no_grad()
def test_logits_steps_and_greedy_tokens_are_the_official_codes(tmp_path: Path, kind: str) -> None:
    main(["convert", str(write(tmp_path / "theirs", kind)), str(tmp_path / "ours"), "--verify"])
    model = load_model(tmp_path / "ours")
    want = load_file(FIXTURES / f"{kind}_outputs.safetensors")
    tokens = want["tokens"].long()
    logits, _ = model(tokens)
    torch.testing.assert_close(logits, want["logits"], rtol=0, atol=1e-4)

    first, state = model(tokens[:, :13], model.init_state(2))
    steps = [model.step(tokens[:, t], state)[:, None] for t in range(13, 24)]
    got = torch.cat([first, *steps], dim=1)
    # The official prefill returns all its logits too.
    torch.testing.assert_close(got, want["step_logits"], rtol=0, atol=1e-4)

    logits, state = model(tokens, model.init_state(2))
    token, greedy = logits[:, -1].argmax(-1), []
    for _ in range(16):
        greedy.append(token)
        token = model.step(token, state).argmax(-1)
    assert torch.equal(torch.stack(greedy, 1), want["greedy"].long())


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        ("based", {"sliding_window_attention": {"num_heads": 2, "window": 4}}),
        ("based", {"sliding_window_attention": {"num_heads": 2, "window": 8}}),
        ("based", {"taylor_linear_attention": {"num_heads": 1, "feature_dim": 8}}),
        ("attn", {"softmax_attention": {"num_heads": 2, "rotary_fraction": 0.4}}),
    ],
)
@torch.no_grad()
def test_a_wrong_dial_would_not_pass(tmp_path: Path, kind: str, detail: dict) -> None:
    model = converted(write(tmp_path, kind))
    config = model.config.to_dict()
    wrong = Decoder(
        type(model.config).from_dict(
            {**config, "mixer_options": {**config["mixer_options"], **detail}}
        )
    )
    wrong.load_state_dict(model.state_dict())
    want = load_file(FIXTURES / f"{kind}_outputs.safetensors")
    assert (wrong(want["tokens"].long())[0] - want["logits"]).abs().max() > 0.05


# Every form of the files


def as_safetensors(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    state = weights("based")
    # A file of tensors has one of two that share memory; which, is the writer's choice.
    del state[EMBEDDING]
    save_file(state, folder / "model.safetensors")


def as_shards(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    state = list(weights("based").items())
    files = {
        "pytorch_model-00001-of-00002.bin": state[:5],
        "pytorch_model-00002-of-00002.bin": state[5:],
    }
    for file, part in files.items():
        torch.save(dict(part), folder / file)
    names = {name: file for file, part in files.items() for name, _ in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def as_run(folder: Path) -> None:
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({"state_dict": state, "epoch": 1}, folder / "pytorch_model.bin")
    run = {"model": {"_target_": "x.GPTLMHeadModel", "config": configuration("based")}, "seed": 1}
    (folder / "config.json").write_text(json.dumps(run))


def as_old_format(folder: Path) -> None:
    torch.save(weights("based"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def with_other_names(folder: Path) -> None:
    values = configuration("based")
    for old, new in (("n_embd", "hidden_size"), ("n_layer", "num_hidden_layers")):
        values[new] = values.pop(old)
    values["mixer"]["_target_"] = "based.models.mixers.base_conv.BaseConv"
    (folder / "config.json").write_text(json.dumps(values))


def after_construction(folder: Path) -> None:
    shutil.copyfile(FIXTURES / "based_config_after_construction.json", folder / "config.json")


@pytest.mark.parametrize(
    "form",
    [as_safetensors, as_shards, as_run, as_old_format, with_other_names, after_construction],
)
@torch.no_grad()
def test_every_form_gives_the_same_model(tmp_path: Path, form: Callable[[Path], None]) -> None:
    want = converted(write(tmp_path / "plain"))
    form(write(tmp_path / "other"))
    got = converted(tmp_path / "other")
    assert got.config == want.config
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor)


def test_half_precision_stays(tmp_path: Path) -> None:
    folder = write(tmp_path)
    torch.save({n: t.half() for n, t in weights("based").items()}, folder / "pytorch_model.bin")
    assert converted(folder).dtype == torch.float16


def test_a_hub_id_is_read_through_the_hubs_client(tmp_path: Path, monkeypatch, capsys) -> None:
    """Offline, from a cache laid out as the client lays it out, at a named revision."""
    repositories = {"someone/based-tiny": "refs/pr/1", "openai-community/gpt2": "main"}
    for repository, revision in repositories.items():
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs" / revision).parent.mkdir(parents=True)
        (folder / "refs" / revision).write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        if repository == "someone/based-tiny":
            write(snapshot)
            as_safetensors(snapshot)
        else:
            train_tokenizer(["fellow citizens"], 280).save(snapshot / "tokenizer.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    main(["convert", "someone/based-tiny", str(out), "--revision", "refs/pr/1"])
    assert load_model(out).config == converted(write(tmp_path / "plain")).config
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0
    assert "mlp.fc1.weight" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["convert", "someone/other", str(tmp_path / "none")])
    error = capsys.readouterr().err
    assert "config.json is missing there, or the hub cannot be reached" in error
    assert error.count("\n") == 1


# The report


def test_the_report_says_what_was_dropped_and_where_dials_were_found(
    tmp_path: Path, capsys
) -> None:
    main(["convert", str(write(tmp_path / "theirs")), str(tmp_path / "ours")])
    out = capsys.readouterr().out
    for text in (
        "dropped: a buffer that no official mixer reads",
        "dropped: a counter of the training run",
        "dropped: the embedding again (tied)",
        "alt_mixer_2.window_size // 2 past keys",
        "rows of the embedding; 37 and padding",
        "88,384 parameters in torch.float32",
        "give --tokenizer",
    ):
        assert text in out
    _, mapped = convert(Source(str(tmp_path / "theirs")))
    assert sum(mapped.renamed.values()) + len(mapped.dropped) == len(weights("based")) + 1


# The published shapes


def official_shapes(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json and tensor shapes of a published checkpoint, from the official configurations."""
    large = name.endswith("1b")
    if name.startswith("based"):
        values = configuration("based") | {
            "n_embd": 1792 if large else 1024,
            "n_head": 16,
            "n_layer": 36 if large else 27,
            "alt_mixer_layers": [1, 6, 11, 16, 21, 27, 33][: 7 if large else 5],
            "alt_mixer_2_layers": [2, 7, 12, 17, 22, 28, 34][: 7 if large else 5],
            "vocab_size": 50257,
        }
        values["alt_mixer"] |= {"feature_dim": 16, "num_heads": 16}
        values["alt_mixer_2"] |= {"window_size": 256, "num_heads": 16}
        vocabulary, inner = 50264, 2 * values["n_embd"]
    else:
        values = configuration("attn") | {
            "n_embd": 1680 if large else 1024,
            "n_head": 24 if large else 16,
            "n_layer": 36 if large else 24,
            "vocab_size": 50257,
        }
        vocabulary, inner = 50272, 4608 if large else 2816
    d = values["n_embd"]
    shapes = {EMBEDDING: (vocabulary, d), HEAD: (vocabulary, d), "transformer.ln_f.weight": (d,)}
    for layer in range(values["n_layer"]):
        block = {"norm1.weight": (d,), "norm2.weight": (d,)}
        block |= {"mlp.fc1.weight": (2 * inner, d), "mlp.fc2.weight": (d, inner)}
        if name.startswith("attn") or layer in values["alt_mixer_2_layers"]:
            block |= {"mixer.Wqkv.weight": (3 * d, d), "mixer.out_proj.weight": (d, d)}
        elif layer in values["alt_mixer_layers"]:
            block |= {f"mixer.proj_{x}.weight": (256, d) for x in "qk"}
            block |= {f"mixer.{x}.weight": (d, d) for x in ("proj_v", "out_proj")}
        else:
            block |= {"mixer.in_proj.weight": (4 * d, d), "mixer.in_proj.bias": (4 * d,)}
            block |= {"mixer.out_proj.weight": (d, 2 * d), "mixer.out_proj.bias": (d,)}
            block |= {"mixer.conv.conv.weight": (2 * d, 1, 3)}
        shapes |= {f"transformer.layers.{layer}.{name}": s for name, s in block.items()}
    return values, shapes


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("based-360m", "based-360m"),
        ("based-1b", "based-1.3b"),
        ("attn-360m", "attn-360m"),
        ("attn-1b", "attn-1.3b"),
    ],
)
def test_published_shapes_become_our_presets(name: str, ours: str) -> None:
    values, shapes = official_shapes(name)
    tensors = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
    if name == "based-1b":
        tensors["transformer.decay.decay"] = torch.empty(16, device="meta")
    mapped = gpt.convert(values, tensors)
    want = preset(ours)
    options = {"gated_convolution": {"kernel_size": 3, "expand": 2}, **want.mixer_options}
    used = {mixer: options[mixer] for mixer in want.mixers}
    assert mapped.config.to_dict() == {**want.to_dict(), "mixer_options": used}
    model = decoder(mapped.config, mapped.tensors, name)
    assert model.num_parameters() == skeleton(want).num_parameters()
    if name == "attn-1b":
        assert model.mixers()[0].head_dim == 70


# Mistakes


def test_weights_that_are_not_finite_fail_the_check() -> None:
    model = Decoder(preset("based-tiny"))
    assert verify(model) < 1e-4
    with torch.no_grad():
        model.blocks[2].mlp.fc1.weight[3, 5] = float("nan")
    with pytest.raises(BasedError, match=r"blocks\.2\.mlp\.fc1\.weight holds values"):
        verify(model)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path(os.environ["PYTEST_CODE"]) / "ran"),)


def state(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors: dict[str, Any] = weights("based")
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


def cut(folder: Path, name: str = "pytorch_model.bin") -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def cut_safetensors(folder: Path) -> None:
    as_safetensors(folder)
    cut(folder, "model.safetensors")


def lose_a_shard(folder: Path) -> None:
    as_shards(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def escape(folder: Path) -> None:
    as_shards(folder)
    names = {"a": "../../secret.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


LAYER = "transformer.layers.1."


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: state(f, lambda s: s.update(extra=torch.ones(2))), r"has a tensor extra \(2,\)"),
        (
            lambda f: state(f, lambda s: s.update({LAYER + "mixer.g_norm.weight": torch.ones(2)})),
            "g_norm",
        ),
        (lambda f: state(f, lambda s: s.pop(LAYER + "norm1.weight")), "norm.weight is missing"),
        (
            lambda f: state(f, lambda s: s.pop("transformer.layers.0.mixer.conv.conv.weight")),
            "lacks",
        ),
        (
            lambda f: state(f, lambda s: s.update({LAYER + "norm1.weight": torch.ones(5)})),
            r"\(5,\)",
        ),
        (lambda f: state(f, lambda s: s.update({HEAD: torch.ones(40, 32)})), "not the embedding"),
        (lambda f: state(f, lambda s: s.update(code=Code())), "code in it is not run"),
        (lambda f: state(f, lambda s: s.update(text="a")), "text is no tensor"),
        (lambda f: torch.save([1], f / "pytorch_model.bin"), "not a state dict"),
        (lambda f: torch.save({"a.b": torch.ones(1)}, f / "pytorch_model.bin"), "of no family"),
        (cut, "damaged or truncated"),
        (cut_safetensors, "damaged or truncated"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "damaged or truncated"),
        (lambda f: (f / "pytorch_model.bin").unlink(), "no weights in"),
        (lose_a_shard, "lacks pytorch_model-00002"),
        (escape, "outside its directory"),
        (lambda f: cut(f, "config.json"), r"config\.json is not"),
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no object"),
    ],
)
def test_a_spoiled_checkpoint_is_one_line_and_no_output(
    tmp_path: Path, monkeypatch, capsys, spoil: Callable[[Path], Any], message: str
) -> None:
    monkeypatch.setenv("PYTEST_CODE", str(tmp_path))
    spoil(write(tmp_path / "theirs"))
    refused(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")], message, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "geglu"}, "activation_function 'geglu'"),
        ({"rms_norm": False}, "rms_norm False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx True"),
        ({"rotary_emb_fraction": 0.5}, "rotary_emb_fraction is 0.5"),
        ({"rotary_emb_base": 500000.0}, "rotary_emb_base 500000.0"),
        ({"head_dim": 64}, "head_dim 64"),
        ({"n_layer": 4}, "lacks our blocks.3"),
        ({"n_layer": 2}, "no such tensor"),
        ({"n_head": "${...}"}, "n_head"),
        ({"n_head": 0}, "n_head 0"),
        ({"vocab_size": 50257}, "more tokens"),
        ({"mixer": {"_target_": "based.models.mixers.h3.H3"}}, r"mixer 'based\.models\.mixers\.h3"),
        ({"alt_mixer_2_layers": [1, 2]}, "do not fit its config"),
        ({"alt_mixer": None, "window_size": [64, 0]}, "window_size"),
    ],
)
def test_a_configuration_that_is_not_ours_is_one_line(
    tmp_path: Path, capsys, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "theirs", **changes)
    refused(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")], message, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_no_source_no_tokenizer_no_disk(tmp_path: Path, monkeypatch, capsys) -> None:
    theirs, out = str(write(tmp_path / "theirs")), str(tmp_path / "ours")
    refused(["convert", str(tmp_path / "none"), out], "there is no directory", capsys)
    (tmp_path / "t.json").write_text("{")
    options = ["--tokenizer", str(tmp_path / "t.json")]
    refused(["convert", theirs, out, *options], "not a tokenizer file", capsys)
    refused(["convert", theirs, out, "--tokenizer", theirs], "no tokenizer.json in", capsys)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("based.models.checkpoint.save_file", full)
    refused(["convert", theirs, out], "the disk is full", capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "theirs"]


def refused(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.startswith("based: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
