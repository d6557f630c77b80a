"""Mamba checkpoints in the state-spaces layout: transformers' logits, and every mistake."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from based.errors import BasedError
from based.models import Decoder
from based.models.convert import mamba

VALUES = {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 37,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 8,
}


def mamba1() -> nn.Module:
    return MambaForCausalLM(
        MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=5)
    )


def mamba2() -> nn.Module:
    config = Mamba2Config(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=6,
        head_dim=16,
        num_heads=4,
        n_groups=1,
        tie_word_embeddings=True,
    )
    return Mamba2ForCausalLM(config)


def checkpoint(theirs: nn.Module) -> dict[str, Tensor]:
    """As the official training saves it: its name for the embedding, the head, a counter."""
    state = {name.replace("embeddings", "embedding"): t for name, t in theirs.state_dict().items()}
    state["lm_head.weight"] = state["backbone.embedding.weight"]
    return {**state, "train_metrics.num-tokens.count": torch.tensor(7)}


@pytest.mark.parametrize(("make", "mixer"), [(mamba1, "mamba"), (mamba2, "mamba2")])
@torch.no_grad()
def test_logits_are_transformers(make: Callable[[], nn.Module], mixer: str) -> None:
    theirs = make().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    mapped = mamba.convert(VALUES, checkpoint(theirs))
    assert sorted(mapped.dropped) == ["lm_head.weight", "train_metrics.num-tokens.count"]
    assert mapped.config.mixers == (mixer, mixer)
    model = Decoder(mapped.config)
    model.load_state_dict(mapped.tensors)
    tokens = torch.randint(0, 40, (2, 23))
    want = theirs(tokens).logits
    torch.testing.assert_close(model(tokens)[0], want, rtol=0, atol=1e-4 * want.std().item())
    own_names = mamba.convert({}, theirs.state_dict())
    assert own_names.config == mapped.config


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ({"d_model": 64}, {}, "d_model 64, the tensors 32"),
        ({"n_layer": 3}, {}, "n_layer 3, the tensors 2"),
        ({"rms_norm": False}, {}, "rms_norm False"),
        ({"tie_embeddings": False}, {}, "tie_embeddings False"),
        ({"d_intermediate": 8}, {}, "d_intermediate 8"),
        ({"attn_layer_idx": [1]}, {}, r"attn_layer_idx \[1\]"),
        ({"ssm_cfg": {"ngroups": 4}}, {}, "ngroups 4"),
        ({}, {"lm_head.weight": torch.ones(40, 32)}, "not the embedding"),
        (
            {},
            {"backbone.embedding.weight": None, "backbone.embeddings.weight": torch.ones(40, 32)},
            "not the embedding",
        ),
        ({}, {"backbone.layers.0.mixer.E": torch.ones(1)}, "which no model here has"),
        ({}, {"backbone.embedding.weight": None}, "lacks our embedding.weight"),
        ({}, {"backbone.layers.0.mixer.A_log": None}, r"lacks our blocks\.0\.mixer\.A_log"),
    ],
)
def test_what_cannot_be_is_one_line(
    values: dict[str, Any], tensors: dict[str, Tensor | None], message: str
) -> None:
    state = {**checkpoint(mamba1()), **tensors}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(BasedError, match=message) as raised:
        mamba.convert({**VALUES, **values}, state)
    assert "\n" not in str(raised.value)
