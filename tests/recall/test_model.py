"""The lab's model: the paper's own on the same weights, its initialisation, its state."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from based.recall.architectures import ARCHITECTURES, build_model
from based.recall.config import Point, Recipe
from based.recall.model import RecallModel
from based.recall.mqar import Task

FILES = Path(__file__).parent / "zoology"
NAMES = {
    "backbone.embeddings.word_embeddings": "embedding",
    "backbone.layers": "body.blocks",
    "backbone.ln_f": "body.norm",
    "sequence_mixer.mixer": "mixer",
    "conv.conv.weight": "conv_weight",
    "conv.conv.bias": "conv_bias",
    "projection": "proj",
    "proj_q": "q_proj",
    "proj_k": "k_proj",
    "proj_v": "v_proj",
    "proj_o": "out_proj",
    "Wqkv": "qkv_proj",
}


def official(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights under our names, tokens, logits."""
    tensors = load_file(FILES / f"{name}.safetensors")
    tokens, logits = tensors.pop("tokens"), tensors.pop("logits")
    weights = {}
    for key, tensor in tensors.items():
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        weights[key] = tensor[:, 0] if key.endswith("conv_weight") else tensor
    return weights, tokens, logits


def model_of(point: Point, vocab_size: int = 24) -> RecallModel:
    task = Task(20, 3, 2)
    recipe = Recipe(vocab_size=vocab_size, train=(task,), test=(task,))
    return build_model(point, recipe).eval()


@pytest.mark.parametrize("name", ["based", "attention"])
def test_the_papers_model_on_the_same_weights(name: str) -> None:
    weights, tokens, want = official(name)
    model = model_of(Point(name, 12, {"feature_dim": 4} if name == "based" else {}))
    model.load_state_dict(weights)
    everywhere = torch.arange(20, dtype=torch.int32).expand(2, 20)
    got = model.logits(model(tokens, everywhere))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    some = torch.tensor([[3, 17], [19, 4]], dtype=torch.int32)
    index = some.long()[..., None].expand(-1, -1, 24)
    torch.testing.assert_close(model.logits(model(tokens, some)), got.gather(1, index))


def test_weights_begin_as_published() -> None:
    """0.02 everywhere; out_proj smaller in attention points alone; Mamba's own in its block."""
    based, attention = (model_of(Point(name, 128), 512) for name in ("based", "attention"))

    def spread(model: RecallModel, name: str) -> float:
        return model.get_parameter(name).std().item()

    for model in (based, attention):
        assert spread(model, "embedding.weight") == pytest.approx(0.02, rel=0.02)
        assert spread(model, "body.blocks.0.mixer.proj.weight") == pytest.approx(0.02, rel=0.05)
        assert spread(model, "body.blocks.0.mixer.proj.bias") == 0
    assert spread(based, "body.blocks.1.mixer.out_proj.weight") == pytest.approx(0.02, rel=0.05)
    assert spread(attention, "body.blocks.1.mixer.out_proj.weight") == pytest.approx(0.01, rel=0.05)
    mamba = model_of(Point("mamba", 128), 512)
    uniform = (1 / 128 / 3) ** 0.5
    assert spread(mamba, "body.blocks.0.mixer.in_proj.weight") == pytest.approx(uniform, rel=0.05)
    inner = (1 / 256 / 3 / 2) ** 0.5
    assert spread(mamba, "body.blocks.1.mixer.out_proj.weight") == pytest.approx(inner, rel=0.05)
    hyena = model_of(Point("hyena", 128), 512)
    for name in ("weights.1", "out_weight"):
        assert spread(hyena, f"body.blocks.0.mixer.filter.{name}") == pytest.approx(0.02, rel=0.05)
    assert spread(hyena, "body.blocks.0.mixer.filter.biases.1") == 0
    assert not any(name.endswith("norm2.weight") for name, _ in mamba.named_parameters())


def test_a_seed_fixes_the_weights_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (
        model_of(Point("based", 16, seed=seed)).embedding.weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_declared_bytes_are_those_of_the_state(architecture: str) -> None:
    model = model_of(Point(architecture, 64))
    measured = 0
    for mixer in model.mixers():
        _, state = mixer(torch.randn(1, 20, 64), mixer.init_state(1))
        measured += state.nbytes
    assert model.state_bytes(20) == measured
