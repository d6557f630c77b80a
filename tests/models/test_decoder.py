"""The decoder: its forms agree, its sizes are the published ones, its files survive."""

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from based.errors import BasedError
from based.models import PRESETS, Decoder, DecoderConfig, load_model, preset, save_model
from based.models.accounting import settings_within
from based.models.checkpoint import WEIGHTS, model_folder
from based.models.skeleton import skeleton

MIXERS = (
    "gated_convolution",
    "taylor_linear_attention",
    "sliding_window_attention",
    "softmax_attention",
)


def tiny(dtype: torch.dtype = torch.float64, intermediate_size: int = 48) -> Decoder:
    config = DecoderConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=intermediate_size,
        mixers=MIXERS,
        mixer_options={
            "taylor_linear_attention": {"num_heads": 2, "feature_dim": 4},
            "sliding_window_attention": {"num_heads": 2, "window": 5},
            "softmax_attention": {"num_heads": 2},
        },
    )
    model = Decoder(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("based-360m", 362_620_928),
        ("based-1.3b", 1_349_453_056),
        ("attn-360m", 359_810_048),
        ("attn-1.3b", 1_327_080_720),
        ("mamba-360m", 358_190_080),
        ("mamba-1.3b", 1_319_311_360),
    ],
)
def test_published_sizes(name: str, count: int) -> None:
    assert skeleton(preset(name)).num_parameters() == count


def test_a_skeleton_needs_no_compiler() -> None:
    """PyTorch's would be a second of every command's start; Mamba's arithmetic does load it."""
    code = (
        "import sys; from based.models import preset; "
        "from based.models.skeleton import skeleton; "
        "[skeleton(preset(name)) for name in ('based-1.3b', 'attn-1.3b', 'window-tiny')]; "
        "print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_published_state_has_153_features_and_a_window_of_129() -> None:
    model = skeleton(preset("based-1.3b"))
    linear = model.mixers()[1].state_spec(0, torch.bfloat16)
    assert linear["numerator"].shape == (16, 153, 112)
    assert model.mixers()[2].state_spec(0, torch.bfloat16)["keys"].shape == (129, 16, 112)
    assert model.state_bytes(2048, torch.bfloat16) == model.state_bytes(1 << 20, torch.bfloat16)


def test_tiny_models_of_the_demo_have_the_same_size() -> None:
    sizes = [
        skeleton(preset(f"{kind}-tiny")).num_parameters() for kind in ("based", "attn", "window")
    ]
    assert max(sizes) / min(sizes) < 1.03


def test_dials_change_the_state_and_nothing_else_does() -> None:
    small = skeleton(preset("based-360m", feature_dim=8, window=65))
    assert small.state_bytes(0) < skeleton(preset("based-360m")).state_bytes(0)
    rows = settings_within("based-360m", 3_000_000, torch.bfloat16)
    assert rows
    for feature_dim, window, size in rows:
        model = skeleton(preset("based-360m", feature_dim=feature_dim, window=window))
        assert model.state_bytes(0, torch.bfloat16) == size <= 3_000_000


@pytest.mark.parametrize("intermediate_size", [48, 0])
def test_forward_is_prefill_is_steps(intermediate_size: int) -> None:
    model = tiny(intermediate_size=intermediate_size)
    tokens = torch.randint(0, 40, (2, 30))
    assert any("mlp" in name for name, _ in model.named_parameters()) == (intermediate_size > 0)
    whole, _ = model(tokens)
    first, state = model(tokens[:, :11], model.init_state(2))
    second, state = model(tokens[:, 11:20], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole[:, :20], rtol=1e-9, atol=1e-9)
    for t in range(20, 30):
        got = model.step(tokens[:, t], state)
        torch.testing.assert_close(got, whole[:, t], rtol=1e-9, atol=1e-9)
    assert state.nbytes == 2 * model.state_bytes(30)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_give_what_each_row_gives_alone(side: str) -> None:
    model, lengths = tiny(), [4, 9, 1]
    tokens = torch.randint(0, 40, (3, 9))
    slot = torch.arange(9)
    mask = torch.stack([slot >= 9 - n if side == "left" else slot < n for n in lengths])
    logits, state = model(tokens, model.init_state(3), mask=mask)
    follow = torch.randint(0, 40, (3,))
    after = model.step(follow, state)
    for row in range(3):
        alone, state = model(tokens[row : row + 1, mask[row]], model.init_state(1))
        torch.testing.assert_close(logits[row, mask[row]], alone[0], rtol=1e-9, atol=1e-9)
        stepped = model.step(follow[row : row + 1], state)
        torch.testing.assert_close(after[row], stepped[0], rtol=1e-9, atol=1e-9)


def test_residual_stream_is_float32_in_a_bfloat16_model() -> None:
    model = tiny(torch.bfloat16)
    seen = []
    model.blocks[0].register_forward_hook(lambda _, args, out: seen.extend([args[0], out[0]]))
    model(torch.randint(0, 40, (1, 5)))
    assert {x.dtype for x in seen} == {torch.float32}


def test_initialisation() -> None:
    model = Decoder(preset("based-tiny"))
    block = model.blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert block.mixer.out_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert (block.mixer.in_proj.bias == 0).all()


def test_mamba_begins_as_its_authors_have_it() -> None:
    """torch's own uniform weights, out_proj over the root of the residual additions."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "mixers": ("mamba",) * 4}
    mixer = Decoder(DecoderConfig(**sizes, intermediate_size=0)).blocks[0].mixer
    assert mixer.in_proj.weight.std().item() == pytest.approx((1 / 64 / 3) ** 0.5, rel=0.05)
    assert mixer.out_proj.weight.std().item() == pytest.approx((1 / 128 / 3 / 4) ** 0.5, rel=0.05)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    model, tokens = tiny(torch.float32), torch.randint(0, 40, (1, 12))
    save_model(model, tmp_path / "m")
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.config.to_dict() == model.config.to_dict()
    torch.testing.assert_close(loaded(tokens)[0], model(tokens)[0], rtol=0, atol=0)
    assert load_model(tmp_path / "m", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def spoil_missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def spoil_truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def spoil_foreign_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def spoil_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_shape(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 41}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, "is missing"),
        (spoil_truncated, "damaged or truncated"),
        (spoil_foreign_type, "model_type"),
        (spoil_json, "not a model's configuration"),
        (spoil_shape, "do not fit"),
    ],
)
def test_a_spoiled_model_is_one_line(tmp_path: Path, spoil, message: str) -> None:
    save_model(tiny(), tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(BasedError, match=message) as raised:
        load_model(tmp_path / "m")
    assert "\n" not in str(raised.value)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(BasedError, match="there is no"):
        model_folder(tmp_path / "none")
    with pytest.raises(BasedError, match=r"config\.json is missing"):
        load_model(model_folder(tmp_path))


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    save_model(model, tmp_path / "m")
    before = (tmp_path / "m" / WEIGHTS).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("based.models.checkpoint.save_file", full)
    with pytest.raises(BasedError, match="disk is full"):
        save_model(tiny(), tmp_path / "m")
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset("nothing"), "no preset is named"),
        (lambda: preset("attn-360m", window=64), "no such dial"),
        (lambda: Decoder(preset("based-tiny", window=0)), "window is 0"),
        (lambda: Decoder(preset("based-tiny", feature_dim=0)), "feature_dim is 0"),
        (lambda: Decoder(replace(preset("based-tiny"), hidden_size=130)), "does not divide"),
        (lambda: Decoder(replace(preset("based-tiny"), mixers=("magic",))), "no mixer is named"),
        (lambda: replace(preset("based-tiny"), mixers=()), "mixers is empty"),
        (lambda: replace(preset("based-tiny"), vocab_size=0), "vocab_size is 0"),
        (lambda: replace(preset("based-tiny"), intermediate_size=-1), "must be at least 0"),
        (lambda: DecoderConfig.from_dict({"colour": 1}), "unknown fields: colour"),
        (lambda: DecoderConfig.from_dict({"vocab_size": 1}), "incomplete"),
        (lambda: settings_within("attn-360m", 10, torch.float32), "no dials"),
    ],
)
def test_bad_configurations_are_one_line(make, message: str) -> None:
    with pytest.raises(BasedError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_every_preset_can_be_built() -> None:
    for name in PRESETS:
        assert skeleton(preset(name)).num_parameters() > 500_000
