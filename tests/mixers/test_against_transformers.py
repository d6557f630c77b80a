"""Mamba and Mamba-2 give what transformers' modules give on the same weights."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from based.mixers import Mixer, build_mixer
from based.models.convert.mamba import RULES
from based.models.convert.tensors import rename

SIZE, LENGTH = 32, 150


def mamba() -> tuple[nn.Module, Mixer]:
    options = {"hidden_size": SIZE, "state_size": 5, "conv_kernel": 4, "time_step_rank": 3}
    ours = build_mixer("mamba", SIZE, state_size=5, dt_rank=3)
    return MambaMixer(MambaConfig(num_hidden_layers=1, **options), 0), ours


def mamba2() -> tuple[nn.Module, Mixer]:
    options = {"hidden_size": SIZE, "state_size": 6, "head_dim": 8, "num_heads": 8, "n_groups": 1}
    config = Mamba2Config(num_hidden_layers=1, chunk_size=16, layer_norm_epsilon=1e-5, **options)
    return Mamba2Mixer(config, 0), build_mixer("mamba2", SIZE, state_size=6, head_dim=8)


def ours_from(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their mixer's weights by our names."""
    prefix = "backbone.layers.0.mixer."
    tensors, _, _ = rename({prefix + name: tensor for name, tensor in state.items()}, RULES, {})
    tensors = {name.removeprefix("blocks.0.mixer."): t for name, t in tensors.items()}
    return {**tensors, "conv.weight": tensors["conv.weight"].squeeze(1)}


def theirs_and_ours(make) -> tuple[nn.Module, Mixer, Tensor]:
    theirs, ours = make()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else SIZE**-0.5)
    ours.load_state_dict(ours_from(theirs.state_dict()))
    return theirs.eval(), ours, torch.randn(2, LENGTH, SIZE)


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_outputs_and_gradients(make) -> None:
    theirs, ours, x = theirs_and_ours(make)
    gradients = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = module(leaf) if module is theirs else module(leaf)[0]
        gradients.append([y, *torch.autograd.grad(y.square().sum(), [leaf, module.A_log])])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5 * want.abs().max().item())


@pytest.mark.parametrize("make", [mamba, mamba2])
@torch.no_grad()
def test_states(make) -> None:
    theirs, ours, x = theirs_and_ours(make)
    config = (MambaConfig if make is mamba else Mamba2Config)(num_hidden_layers=1)
    cache = DynamicCache(config=config)
    theirs(x, cache=cache)
    _, state = ours(x, ours.init_state(2))
    assert state is not None
    want = cache.get_recurrent_state(0, state_idx=0)
    # transformers has Mamba-2's state as [heads, head_dim, state_size].
    want = want if make is mamba else want.mT
    torch.testing.assert_close(state["h"], want, rtol=1e-4, atol=1e-5)
