"""What single mixers promise beyond the common suite: limits, dropout, random features."""

import re

import pytest
import torch

from based.errors import BasedError
from based.mixers import build_mixer

SIZE = 24


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hyena", {"max_length": 10, "filter_size": 4}),
        (
            "linear_attention",
            {"num_heads": 2, "feature_dim": 3, "feature_map": "cosformer", "max_length": 10},
        ),
    ],
)
def test_a_sequence_beyond_max_length_is_refused(name: str, options: dict[str, object]) -> None:
    mixer = build_mixer(name, SIZE, **options)
    x = torch.randn(1, 12, SIZE)
    mixer(x[:, :10])
    for edges in (None, torch.tensor([0, 11, 12])):
        with pytest.raises(BasedError, match=r"11 tokens .* max_length 10; raise max_length"):
            mixer(x if edges is not None else x[:, :11], None, edges)
    mixer(x, None, torch.tensor([0, 10, 12]))
    _, state = mixer(x[:, :9], mixer.init_state(1))
    with pytest.raises(BasedError, match="max_length 10"):
        mixer(x[:, 9:11], state)
    with torch.no_grad():
        mixer.step(x[:, 9], state)
        before = state.clone()
        with pytest.raises(BasedError, match="max_length 10"):
            mixer.step(x[:, 10], state)
    for tensor in before:
        torch.testing.assert_close(state[tensor], before[tensor], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear_attention", {"feature_map": "gelu"}, "no feature map is named 'gelu'"),
        ("linear_attention", {"feature_map": "cosformer"}, "max_length"),
        ("linear_attention", {"feature_map": "relu", "max_length": 5}, "max_length"),
        ("linear_attention", {"feature_map": "performer", "num_features": 0}, "num_features is 0"),
        ("h3", {"state_size": 3}, "state_size is 3; it must be an even number"),
        ("h3", {"head_dim": 5}, "24 does not divide into heads of head_dim 5"),
        ("hyena", {"max_length": 0}, "max_length is 0"),
        ("base_convolution", {"kernel_size": 0}, "kernel_size is 0"),
        ("softmax_attention", {"attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ("sliding_window_attention", {"attention_dropout": -0.1}, "attention_dropout is -0.1"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(BasedError, match=re.escape(message)):
        build_mixer(name, SIZE, **{"num_heads": 2, **options} if "atten" in name else options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("softmax_attention", {}), ("sliding_window_attention", {"window": 40})],
)
@pytest.mark.parametrize("continued", [False, True])
def test_attention_dropout_is_of_weights_and_in_training_alone(
    name: str, options: dict[str, int], continued: bool
) -> None:
    """With equal values an output is the sum of the kept weights / 0.75: 1 on average."""
    mixer = build_mixer(name, SIZE, num_heads=1, attention_dropout=0.25, **options)
    plain = build_mixer(name, SIZE, num_heads=1, **options)
    with torch.no_grad():
        mixer.qkv_proj.weight.zero_()
        mixer.out_proj.weight.copy_(torch.eye(SIZE))
        # Channel 0 is 1 everywhere; values copy it and scores are zero.
        mixer.qkv_proj.weight[2 * SIZE :, 0] = 1
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(64, 40, SIZE)
    x[..., 0] = 1

    @torch.no_grad()
    def last(module: torch.nn.Module) -> torch.Tensor:
        state = mixer.init_state(64) if continued else None
        if continued:
            _, state = module(x[:, :20], state)
        return module(x[:, 20:] if continued else x, state)[0][:, -1, 0]

    dropped = last(mixer)
    assert dropped.mean() == pytest.approx(1.0, abs=0.05)
    assert dropped.std() == pytest.approx((0.25 / 0.75 / 40) ** 0.5, rel=0.4)
    assert not torch.equal(dropped, last(mixer))
    torch.testing.assert_close(last(mixer.eval()), last(plain))


def test_performer_estimates_a_positive_kernel_with_features_of_the_checkpoint() -> None:
    options = {"num_heads": 2, "feature_dim": 8, "feature_map": "performer", "num_features": 20}
    one, other = (build_mixer("linear_attention", SIZE, **options) for _ in range(2))
    x = torch.randn(1, 9, SIZE)
    assert not torch.allclose(one(x)[0], other(x)[0])
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x)[0], other(x)[0])
    directions = one.state_dict()["feature_map.directions"]
    # Orthogonal inside a block, of one length.
    gram = directions[:8] @ directions[:8].T
    torch.testing.assert_close(gram, torch.eye(8) * 8 / 20, rtol=0, atol=1e-6)


def test_cosformer_weighs_a_key_by_the_cosine_of_its_distance() -> None:
    options = {"num_heads": 1, "feature_dim": 4, "feature_map": "cosformer", "max_length": 50}
    features = build_mixer("linear_attention", SIZE, **options).feature_map
    x = torch.rand(1, 50, 1, 4, dtype=torch.float64)
    phi = features(x, torch.arange(50)[None])[0, :, 0]
    distance = (torch.arange(50)[:, None] - torch.arange(50)).double()
    want = (x[0, :, 0] @ x[0, :, 0].T) * torch.cos(torch.pi / 2 * distance / 50)
    torch.testing.assert_close(phi @ phi.T, want)


def test_h3_state_is_what_it_says() -> None:
    """state_size * head_dim * hidden_size numbers of memory, and state_size - 1 keys."""
    mixer = build_mixer("h3", 64, state_size=16, head_dim=2)
    assert mixer.state_bytes(1, torch.float32) == 4 * (16 * 2 * 64 + 15 * 64)
    assert mixer.state_bytes(10_000, torch.bfloat16) == 4 * 16 * 2 * 64 + 2 * 15 * 64


def test_h3_remembers_with_the_published_time_scales() -> None:
    mixer = build_mixer("h3", 512, state_size=8)
    decay, *_ = mixer._system(torch.float64)
    # exp(-dt / 2) for dt from 0.001 to 0.1.
    assert 0.9485 < decay.abs()[:, 0].min() < 0.9525
    assert 0.999 < decay.abs()[:, 0].max() < 0.9996
