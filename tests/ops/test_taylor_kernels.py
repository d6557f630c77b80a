"""The Triton kernels of Taylor linear attention against float64: interpreted, or on the GPU."""

import pytest
import torch
from torch import Tensor

from based.ops.taylor_linear_attention import chunked
from based.ops.taylor_linear_attention.kernels import launch
from based.ops.taylor_linear_attention.operator import _unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALES = (1.0, 0.01, 0.01)
# Largest relative Frobenius errors: outputs, gradients of q, k and v, final state.
LIMITS = {
    torch.float32: (1e-5, 1e-5, 1e-5),
    torch.bfloat16: (4e-3, 1e-2, 2e-3),
    torch.float16: (4e-3, 1e-2, 2e-3),
}
if DEVICE == "cpu":
    # The interpreter truncates where the hardware rounds to nearest.
    LIMITS[torch.bfloat16] = LIMITS[torch.float16] = (2e-2, 4e-2, 2e-2)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-1)).item()


def initial_state(rows: int, heads: int, feature_dim: int, head_dim: int) -> list[Tensor]:
    k, v = draw(rows, 20, heads, feature_dim), draw(rows, 20, heads, head_dim)
    return [x.float() for x in chunked.taylor_linear_attention(k, k, v)[1:]]


def compare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    state: list[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Outputs, final state and all gradients on the same rounded inputs."""
    inputs = [x.to(dtype) for x in (q, k, v)]
    leaves = [x.double().requires_grad_() for x in (*inputs, *(state or []))]
    start = leaves[3:] or [None, None]
    wanted = chunked.taylor_linear_attention(*leaves[:3], *start, cu_seqlens)
    weights = [torch.randn_like(x) * scale for x, scale in zip(wanted, SCALES, strict=True)]
    weights[0] = weights[0].to(dtype).double()
    gradients = torch.autograd.grad(wanted, leaves, weights)

    out, *final, below, states = launch.forward(
        *inputs, *(state or [None, None]), cu_seqlens, want_state=True
    )
    got = launch.backward(
        *inputs,
        cu_seqlens,
        out,
        below,
        states,
        weights[0].to(dtype),
        *(x.float() for x in weights[1:]),
    )
    of_out, of_gradients, of_state = LIMITS[dtype]
    assert error(out, wanted[0]) <= of_out
    for a, b in zip(final, wanted[1:], strict=True):
        assert error(a, b) <= of_state
    for a, b in zip(got, gradients, strict=False):
        assert error(a, b) <= of_gradients


@pytest.fixture(autouse=True)
def _several_strips(monkeypatch) -> None:
    """So that a few segments are already several strips."""
    monkeypatch.setattr(launch, "PROGRAMS", 2)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 600])
def test_lengths(length) -> None:
    compare(
        draw(1, length, 1, 16), draw(1, length, 1, 16), draw(1, length, 1, 16) + 0.5, torch.float32
    )


@pytest.mark.parametrize(("feature_dim", "head_dim"), [(8, 17), (16, 64), (24, 16), (32, 17)])
def test_dims_batches_and_initial_states(feature_dim, head_dim) -> None:
    q, k = draw(2, 260, 1, feature_dim), draw(2, 260, 1, feature_dim)
    state = initial_state(2, 1, feature_dim, head_dim)
    compare(q, k, draw(2, 260, 1, head_dim) + 0.5, torch.float32, state)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.bfloat16, 112), (torch.float16, 64), (torch.bfloat16, 160)]
)
def test_low_precision_with_large_scores(dtype, head_dim) -> None:
    """Scores |s| up to about 20 and values of non-zero mean."""
    q, k = 4 * draw(1, 270, 1, 16), draw(1, 270, 1, 16)
    compare(q, k, draw(1, 270, 1, head_dim) + 0.5, dtype)


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences(with_state) -> None:
    edges = torch.tensor([0, 30, 30, 31, 330], device=DEVICE)
    q, k, v = draw(1, 330, 1, 16), draw(1, 330, 1, 16), draw(1, 330, 1, 24)
    state = initial_state(4, 1, 16, 24) if with_state else None
    compare(q, k, v, torch.float32, state, edges)


def test_strided_inputs_are_read_in_place() -> None:
    whole = draw(2, 70, 3, 2, 16).float()
    q, k = whole.unbind(3)
    v = draw(2, 3, 70, 16).float().transpose(1, 2)
    out, *_ = launch.forward(q, k, v, None, None, None, want_state=False)
    want = chunked.taylor_linear_attention_outputs(q.double(), k.double(), v.double())
    assert error(out, want) < 1e-5


def test_a_nan_stays_in_its_sequence() -> None:
    q, k, v = draw(1, 90, 1, 16).float(), draw(1, 90, 1, 16).float(), draw(1, 90, 1, 16).float()
    v[0, 40] = float("nan")
    edges = torch.tensor([0, 30, 60, 90], device=DEVICE)
    out, *_ = launch.forward(q, k, v, None, None, edges, want_state=False)
    assert not out[0, :30].isnan().any()
    assert out[0, 40:60].isnan().all()
    assert not out[0, 60:].isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("feature_dim", [8, 16, 24, 32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 112, 128, 192, 256])
@pytest.mark.filterwarnings("ignore:Taylor linear attention takes the slower")
def test_every_configuration_on_the_gpu(dtype, feature_dim, head_dim) -> None:
    if _unsupported(feature_dim, head_dim, dtype) is not None:
        return
    q, k = draw(2, 1000, 3, feature_dim), draw(2, 1000, 3, feature_dim)
    state = initial_state(2, 3, feature_dim, head_dim)
    compare(q, k, draw(2, 1000, 3, head_dim) + 0.5, dtype, state)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_pair_planted_a_million_tokens_back_is_recalled() -> None:
    length = 1 << 20
    k, v = 0.1 * draw(1, length, 1, 16).bfloat16(), torch.zeros(1, length, 1, 64, device=DEVICE)
    key = (3 * draw(16)).bfloat16()
    k[0, 0, 0], v[0, 0, 0] = key, 1000.0
    q = torch.zeros_like(k)
    q[0, -1, 0] = key
    out, *_ = launch.forward(q, k, v.bfloat16(), None, None, None, want_state=False)
    s = (k.double() @ key.double())[0, :, 0] / 4
    weights = 1 + s + s**2 / 2
    want = 1000.0 * weights[0] / weights.sum()
    torch.testing.assert_close(out[0, -1, 0].double(), want.expand(64), rtol=2e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_forward_is_deterministic() -> None:
    q, k, v = (draw(4, 3000, 4, d).bfloat16() for d in (16, 16, 64))
    first = launch.forward(q, k, v, None, None, None, want_state=True)
    for _ in range(5):
        again = launch.forward(q, k, v, None, None, None, want_state=True)
        assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
