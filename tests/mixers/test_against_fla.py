"""The recurrent mixers give what flash-linear-attention's layers give on the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from based.mixers import build_mixer
from based.mixers.rwkv5 import RWKV5
from based.ops.decayed_linear_attention import decayed_linear_attention

FIXTURES = Path(__file__).parent / "fla"
SIZE = 24

ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
DELTA = {"beta_proj": "b_proj", "out_proj": "o_proj"}
RWKV_LOW_RANK = {"decay": "w_lora", "rate": "a_lora", "gate": "g_lora"}


def linear(theirs: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {f"{ours}.weight": theirs[f"{name}.weight"] for ours, name in names.items()}


def convolved(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their three projections and convolutions side by side, and the norm."""
    return {
        "qkv_proj.weight": torch.cat([theirs[f"{x}_proj.weight"] for x in "qkv"]),
        "conv.weight": torch.cat([theirs[f"{x}_conv1d.weight"] for x in "qkv"]).squeeze(1),
        "norm_weight": theirs["o_norm.weight"],
    }


def gated_linear_attention(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    decay = {"gate_proj": "g_proj", "decay_down": "gk_proj.0", "decay_up": "gk_proj.1"}
    return {
        **linear(theirs, ATTENTION | decay),
        "decay_up.bias": theirs["gk_proj.1.bias"],
        "norm_weight": theirs["g_norm_swish_gate.weight"],
    }


def delta_net(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**linear(theirs, DELTA), **convolved(theirs)}


def gated_delta_net(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    gate = {"gate_proj": "g_proj"} if "g_proj.weight" in theirs else {}
    decay = {name: theirs[name] for name in ("A_log", "dt_bias")}
    return linear(theirs, DELTA | gate | {"decay_proj": "a_proj"}) | convolved(theirs) | decay


def rwkv7(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    attention = {**ATTENTION, "r_proj": "r_proj"}
    del attention["q_proj"]
    low_rank = {f"{x}_down": f"{name}.lora.0" for x, name in RWKV_LOW_RANK.items()}
    low_rank |= {f"{x}_up": f"{name}.lora.2" for x, name in RWKV_LOW_RANK.items()}
    return {
        **linear(theirs, attention | low_rank),
        "shift": torch.cat([theirs[f"x_{x}"] for x in "rkvwag"]).squeeze(1),
        "decay_bias": theirs["w_lora.lora.2.bias"],
        "rate_bias": theirs["a_lora.lora.2.bias"],
        "removal_scale": theirs["k_k"],
        "rate_scale": theirs["k_a"],
        "bonus": theirs["r_k"],
        "norm_weight": theirs["g_norm.weight"],
        "norm_bias": theirs["g_norm.bias"],
    }


@pytest.mark.parametrize(
    ("file", "weights", "options"),
    [
        ("gated_linear_attention", gated_linear_attention, {"num_heads": 3}),
        ("delta_net", delta_net, {"num_heads": 3}),
        ("gated_delta_net", gated_delta_net, {"num_heads": 2, "head_dim": 9}),
        ("gated_delta_net_ungated", gated_delta_net, {"num_heads": 2, "output_gate": False}),
        ("rwkv7", rwkv7, {"head_dim": 8, "decay_rank": 5, "rate_rank": 3, "gate_rank": 4}),
    ],
)
@torch.no_grad()
def test_layers(file: str, weights, options: dict[str, int]) -> None:
    theirs = load_file(FIXTURES / f"{file}.safetensors")
    mixer = build_mixer(file.removesuffix("_ungated"), SIZE, **options)
    mixer.load_state_dict(weights(theirs))
    got, _ = mixer(theirs["x"])
    torch.testing.assert_close(got, theirs["y"], rtol=0, atol=2e-5 * theirs["y"].std().item())


def test_the_operator_of_rwkv5() -> None:
    theirs = load_file(FIXTURES / "rwkv5_op.safetensors")
    q, k, v, w = (theirs[name] for name in "qkvw")
    got = decayed_linear_attention(q, k, v, w.expand(q.shape), theirs["state"], theirs["u"])
    for mine, name in zip(got, ("y", "final"), strict=True):
        torch.testing.assert_close(mine, theirs[name], rtol=0, atol=1e-5 * theirs[name].std())


@torch.no_grad()
def test_rwkv5_is_the_papers_formulas() -> None:
    mixer = RWKV5(SIZE, head_dim=8).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, previous, state = torch.randn(20, SIZE).double(), torch.zeros(SIZE).double(), 0
    decay, bonus = torch.exp(-torch.exp(mixer.decay)), mixer.bonus
    layers = (mixer.r_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj)
    want = []
    for token in x:
        r, k, v, gate = (
            layer.weight @ (token + (previous - token) * share)
            for layer, share in zip(layers, mixer.shift, strict=True)
        )
        r, k, v = (y.view(3, 8) for y in (r, k, v))
        key_value = k[:, :, None] * v[:, None, :]
        out = torch.einsum("hk,hkv->hv", r, bonus[..., None] * key_value + state)
        state, previous = decay[..., None] * state + key_value, token
        normed = F.group_norm(out.view(1, SIZE), 3, mixer.norm_weight, mixer.norm_bias, eps=8e-5)
        want.append(mixer.out_proj.weight @ (normed[0] * F.silu(gate)))
    torch.testing.assert_close(mixer(x[None])[0][0], torch.stack(want), rtol=1e-9, atol=1e-9)
