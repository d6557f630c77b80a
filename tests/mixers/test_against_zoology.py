"""The paper's modules and ours on the same weights; zoology/SOURCE.md says how they were run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from based.mixers import Mixer, build_mixer

FILES = Path(__file__).parent / "zoology"
SIZE = 12
Weights = dict[str, Tensor]


def read(name: str) -> tuple[Tensor, Tensor, Weights]:
    """Inputs, outputs and weights of the official module."""
    tensors = load_file(FILES / f"{name}.safetensors")
    x, y = tensors.pop("x"), tensors.pop("y")
    return x, y, {key.removeprefix("weights."): tensor for key, tensor in tensors.items()}


def assert_outputs_agree(mixer: Mixer, weights: Weights, name: str, tolerance: float) -> None:
    x, y, _ = read(name)
    mixer.load_state_dict(weights)
    with torch.no_grad():
        got, _ = mixer.to(x.dtype)(x)
    torch.testing.assert_close(got, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("identity", {}),
        ("relu", {}),
        ("pos_elu", {}),
        ("square", {}),
        ("all_poly", {}),
        ("cosformer", {"max_length": 17}),
        ("performer", {"num_features": 10}),
    ],
)
def test_feature_maps(name: str, options: dict[str, int]) -> None:
    names = {"random_feats": "directions", "proj_1": "products", "proj_2": "squares"}
    for letter in "qkv":
        names[f"proj_{letter}"] = f"{letter}_proj"
    names["proj_o"] = "out_proj"
    weights = {}
    for key, tensor in read(name)[2].items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        weights[key] = tensor
    mixer = build_mixer(
        "linear_attention", SIZE, num_heads=2, feature_dim=4, feature_map=name, **options
    )
    # CosFormer's angles are float32 there.
    tolerance = 1e-6 if name == "cosformer" else 1e-9
    assert_outputs_agree(mixer.double(), weights, name, tolerance)


def test_taylor() -> None:
    theirs = read("taylor")[2]
    names = {"q_proj": "proj_q", "k_proj": "proj_k", "v_proj": "proj_v", "out_proj": "proj_o"}
    weights = {f"{ours}.weight": theirs[f"{name}.weight"] for ours, name in names.items()}
    mixer = build_mixer("taylor_linear_attention", SIZE, num_heads=2, feature_dim=4)
    assert_outputs_agree(mixer.double(), weights, "taylor", 1e-9)


def test_base_convolution() -> None:
    theirs = read("base_convolution")[2]
    weights = {
        "proj.weight": theirs["projection.weight"],
        "proj.bias": theirs["projection.bias"],
        "conv_weight": theirs["conv.conv.weight"][:, 0],
        "conv_bias": theirs["conv.conv.bias"],
    }
    mixer = build_mixer("base_convolution", SIZE)
    assert_outputs_agree(mixer.double(), weights, "base_convolution", 1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax_attention", {"num_heads": 2}),
        # block_size counts the keys before the query.
        ("sliding_window_attention", {"num_heads": 1, "window": 6}),
    ],
)
def test_attention_without_positions(name: str, options: dict[str, int]) -> None:
    weights = {key.replace("Wqkv", "qkv_proj"): x for key, x in read(name)[2].items()}
    mixer = build_mixer(name, SIZE, rotary_fraction=0.0, bias=True, **options)
    assert_outputs_agree(mixer.double(), weights, name, 1e-12)


def test_hyena() -> None:
    theirs = read("hyena")[2]
    layers = "filter_fn.implicit_filter."
    weights = {
        key: theirs[key]
        for key in ("in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias")
    } | {
        "conv_weight": theirs["short_filter.weight"][:, 0],
        "conv_bias": theirs["short_filter.bias"],
        "skip": theirs["filter_fn.bias"],
        "positions": theirs["filter_fn.pos_emb.z"][0],
        "filter.frequency": theirs[layers + "1.freq"][0],
        "filter.out_weight": theirs[layers + "6.weight"],
    }
    for ours, name in enumerate((0, 2, 4)):
        weights[f"filter.weights.{ours}"] = theirs[f"{layers}{name}.weight"]
        weights[f"filter.biases.{ours}"] = theirs[f"{layers}{name}.bias"]
    mixer = build_mixer("hyena", SIZE, max_length=21, filter_size=6)
    # Theirs counts time in float32.
    assert_outputs_agree(mixer.double(), weights, "hyena", 1e-6)
    drawn = build_mixer("hyena", SIZE, max_length=21, filter_size=6).positions
    torch.testing.assert_close(drawn.double(), weights["positions"])


def test_h3() -> None:
    """Theirs has a vector B in both models, which a product of ours takes in."""
    theirs = read("h3")[2]
    qkv = {
        f"qkv_proj.{part}": torch.cat([theirs[f"{letter}_proj.{part}"] for letter in "qkv"])
        for part in ("weight", "bias")
    }
    shift_b, shift_c = theirs["ssm_k_kernel.kernel.B"], theirs["ssm_k_kernel.kernel.C"][0]
    taps = torch.stack([(shift_b[:, : 4 - lag] * shift_c[:, lag:]).sum(-1) for lag in range(4)])
    taps[0] += theirs["ssm_k_D"]
    b, c = (torch.view_as_complex(theirs[f"kernel.kernel.{name}"]) for name in "BC")
    weights = qkv | {
        "shift_weight": taps,
        "A_log": theirs["kernel.kernel.inv_A_real"],
        "A_imag": theirs["kernel.kernel.A_imag"],
        "C": torch.view_as_real(b * c[0]),
        "log_dt": theirs["kernel.kernel.log_dt"],
        "skip": theirs["D"],
        # Their output has the channel of a head before the head.
        "out_proj.weight": theirs["output_linear.weight"].view(-1, 2, 6).mT.flatten(1),
        "out_proj.bias": theirs["output_linear.bias"],
    }
    mixer = build_mixer("h3", SIZE, state_size=4, head_dim=2)
    assert_outputs_agree(mixer, weights, "h3", 2e-5)
