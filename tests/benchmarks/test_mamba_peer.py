"""mamba-ssm's model as a peer, with a stand-in for it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from based.models import preset
from based.models.presets import PRESETS, mamba_model
from benchmarks import pieces, prefill, training
from benchmarks.mamba import official_mamba

CPU = torch.device("cpu")


@dataclass
class Config:
    d_model: int
    n_layer: int
    vocab_size: int


class Model(nn.Module):
    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.backbone = nn.Embedding(config.vocab_size, config.d_model, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, False, device, dtype)

    def forward(self, tokens: torch.Tensor, num_last_tokens: int) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.backbone(tokens)[:, -num_last_tokens:]))


@pytest.fixture
def mamba_ssm(monkeypatch) -> None:
    for name, attribute, value in (
        ("config_mamba", "MambaConfig", Config),
        ("mixer_seq_simple", "MambaLMHeadModel", Model),
    ):
        module = ModuleType(name)
        setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, f"mamba_ssm.models.{name}", module)
    for name in ("mamba_ssm", "mamba_ssm.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(PRESETS, "mamba-tiny", lambda: mamba_model(32, 2, vocab_size=64))


def test_only_for_mamba_and_only_if_installed(mamba_ssm, monkeypatch) -> None:
    net = official_mamba(preset("mamba-1.3b"), torch.device("meta"), torch.bfloat16)
    assert net.config == Config(2048, 46, 50288)
    assert official_mamba(preset("based-tiny"), CPU, torch.float32) is None
    monkeypatch.setitem(sys.modules, "mamba_ssm.models.mixer_seq_simple", None)
    assert official_mamba(preset("mamba-1.3b"), CPU, torch.float32) is None


def test_it_is_measured_in_the_place_of_ours(mamba_ssm, tmp_path: Path) -> None:
    common = {"device": "cpu", "out": tmp_path, "worker": True, "models": ("mamba-tiny",)}
    prefill.main(prefill.Options(lengths=(16,), tokens=32, repeats=1, **common))
    options = training.Options(lengths=(16,), step_tokens=64, steps=1, **common)
    training.main(options)
    for name in ("prefill", "training"):
        (row,) = pieces.read(tmp_path, name)
        assert (row["kernels"], row["compiled"]) == ("mamba-ssm", False)


def test_its_step_learns_all_tokens_of_the_batch(mamba_ssm) -> None:
    torch.manual_seed(0)
    options = training.Options(step_tokens=64)
    case = training.Case("mamba-tiny", 16, sequences=2, recompute=False)
    net = official_mamba(preset("mamba-tiny"), CPU, torch.float32)
    before = [p.clone() for p in net.parameters()]
    step = training.mamba_step(options, case, CPU, net)
    step()
    for old, new in zip(before, net.parameters(), strict=True):
        moved = (new - old).abs().max().item()
        assert moved == pytest.approx(1e-4, rel=0.2)  # AdamW's first step
