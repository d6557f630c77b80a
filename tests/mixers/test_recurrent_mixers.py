"""What the recurrent mixers promise beyond the common suite: initial values, sizes, refusals."""

import pytest
import torch
from torch.nn import functional as F

from based.errors import BasedError
from based.mixers import build_mixer
from based.models import Decoder, DecoderConfig

SIZE = 48


def in_a_decoder(name: str, **options: int) -> torch.nn.Module:
    config = DecoderConfig(
        vocab_size=10,
        hidden_size=SIZE,
        intermediate_size=0,
        mixers=(name,),
        mixer_options={name: options},
    )
    return Decoder(config).blocks[0].mixer


@pytest.mark.parametrize(
    ("name", "options"),
    [("mamba", {}), ("mamba2", {"head_dim": 12}), ("gated_delta_net", {"num_heads": 24})],
)
def test_time_steps_begin_between_a_thousandth_and_a_tenth(name, options) -> None:
    steps = F.softplus(in_a_decoder(name, **options).dt_bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 0.101
    assert steps.max() > 2 * steps.min()


def test_decays_survive_the_decoders_initialisation() -> None:
    mamba = in_a_decoder("mamba", state_size=5)
    assert mamba.dt_weight.abs().max() <= 3**-0.5
    assert mamba.dt_weight.std().item() == pytest.approx((3 * 3) ** -0.5, rel=0.2)
    torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 6).expand(2 * SIZE, 5))
    rates = in_a_decoder("mamba2", head_dim=4).A_log.exp()
    assert rates.min() >= 1
    assert rates.max() <= 16
    decays = torch.exp(-in_a_decoder("rwkv5", head_dim=8).decay.exp())
    assert decays.max().item() == pytest.approx(0.9975, abs=1e-4)
    assert decays.min().item() == pytest.approx(0.692, abs=1e-3)
    assert in_a_decoder("rwkv7", head_dim=8).decay_bias.std() > 1


@pytest.mark.parametrize(
    ("name", "options", "numbers"),
    [
        ("mamba", {"state_size": 8}, 2 * 64 * 8),
        ("mamba2", {"state_size": 8}, 2 * 64 * 8),
        ("gated_linear_attention", {"num_heads": 2}, 32 * 32),
        ("delta_net", {"num_heads": 2}, 2 * 32 * 32),
        ("gated_delta_net", {"num_heads": 2}, 2 * 32 * 64),
        ("rwkv5", {}, 64 * 64),
        ("rwkv7", {}, 64 * 64),
    ],
)
def test_states_have_the_published_sizes(name: str, options: dict[str, int], numbers: int) -> None:
    spec = build_mixer(name, 64, **options).state_spec(0, torch.bfloat16)
    (own,) = (tensor for tensor in spec.values() if tensor.dtype == torch.float32)
    assert torch.Size(own.shape).numel() == numbers


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mamba", {"state_size": 0}, "state_size is 0"),
        ("mamba", {"conv_size": 0}, "kernel_size is 0"),
        ("mamba", {"dt_rank": 0}, "dt_rank is 0"),
        ("mamba2", {"head_dim": 7}, "head_dim 7 does not divide 96"),
        ("mamba2", {"expand": 0}, "expand is 0"),
        ("rwkv5", {"head_dim": 0}, "head_dim is 0"),
        ("rwkv5", {}, "head_dim 64 does not divide 48"),
        ("rwkv7", {"head_dim": 8, "gate_rank": 0}, "gate_rank is 0"),
        ("gated_linear_attention", {"num_heads": 16}, "24 does not divide into 16 heads"),
        ("gated_linear_attention", {"decay_rank": 0}, "decay_rank is 0"),
        ("delta_net", {"num_heads": 5}, "48 does not divide into 5 heads"),
        ("gated_delta_net", {"num_heads": 0, "head_dim": 8}, "num_heads is 0"),
        ("gated_delta_net", {"head_dim": 0}, "head_dim is 0"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(BasedError, match=message) as raised:
        build_mixer(name, SIZE, **options)
    assert "\n" not in str(raised.value)
