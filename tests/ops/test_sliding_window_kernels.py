"""The Triton kernels of sliding-window attention against float64: interpreted, or on the GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from based.ops import fallback, kernels
from based.ops.sliding_window_attention import operator, sliding_window_attention
from based.ops.sliding_window_attention.kernels import launch
from based.ops.sliding_window_attention.operator import _forward, _unsupported
from based.ops.sliding_window_attention.reference import sliding_window_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
# Largest relative Frobenius errors: outputs, and gradients of q, k and v.
LIMITS = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (4e-3, 1e-2),
    torch.float16: (1e-3, 2e-3),
}
if DEVICE == "cpu":
    # The interpreter truncates where the hardware rounds to nearest.
    LIMITS[torch.bfloat16] = (8e-3, 1e-2)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETING", True)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def inputs(batch: int, length: int, heads: int, head_dim: int, past: int = 0) -> list[Tensor]:
    """q, k, v; values of non-zero mean."""
    q, k = draw(batch, length, heads, head_dim), draw(batch, past + length, heads, head_dim)
    return [q, k, draw(*k.shape) + 0.5]


def error(got: Tensor, want: Tensor) -> float:
    # A window of one key has gradients of zero: they are held to the size that others have.
    size = want.norm().clamp(min=1.0) if want.any() else 0.1 * want.numel() ** 0.5
    return ((got.double() - want).norm() / size).item()


def wanted(q: Tensor, k: Tensor, v: Tensor, window: int, past, edges: Tensor | None) -> Tensor:
    if edges is None:
        return sliding_window_attention_reference(q, k, v, window, past)
    sizes = edges.diff().tolist()
    parts = zip(*(x.split(sizes, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([sliding_window_attention_reference(*x, window) for x in parts], dim=1)


def compare(
    given: list[Tensor],
    window: int,
    dtype: torch.dtype = torch.float32,
    past: Tensor | None = None,
    edges: Tensor | None = None,
) -> None:
    """The operator's outputs and gradients, on the same rounded inputs."""
    leaves = [x.to(dtype).requires_grad_() for x in given]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = wanted(*exact, window, past, edges)
    weight = torch.randn_like(want).to(dtype)
    gradients = torch.autograd.grad(want, exact, weight.double())

    got = sliding_window_attention(*leaves, window, past, edges)
    of_out, of_gradients = LIMITS[dtype]
    assert got.dtype == dtype
    assert error(got, want) <= of_out
    for a, b in zip(torch.autograd.grad(got, leaves, weight), gradients, strict=True):
        assert error(a, b) <= of_gradients


@pytest.mark.parametrize("window", [1, 2, 16, 65, 129, 300])
@pytest.mark.parametrize("length", [65, 200])
def test_windows(window, length) -> None:
    compare(inputs(1, length, 1, 16), window)


@pytest.mark.parametrize("length", [1, 7, 63, 64])
def test_lengths(length) -> None:
    compare(inputs(2, length, 2, 16), 16)


def test_many_blocks_and_inner_tiles_without_masks() -> None:
    compare(inputs(1, 1000, 1, 16), 300)


@pytest.mark.parametrize("head_dim", [17, 64, 112, 128])
def test_head_dims(head_dim) -> None:
    compare(inputs(1, 130, 2, head_dim), 65)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 112, 160])
def test_low_precision_with_large_scores(dtype, head_dim) -> None:
    """Scores up to about 20."""
    q, k, v = inputs(1, 150, 1, head_dim)
    compare([4 * q, k, v], 65, dtype)


@pytest.mark.parametrize(("window", "before"), [(16, 15), (20, 40), (300, 299)])
def test_past_keys_of_which_some_do_not_exist(window, before) -> None:
    past = torch.tensor([0, before // 2, 10 * before], device=DEVICE)
    compare(inputs(3, 40, 1, 16, before), window, past=past)
    compare(inputs(1, 70, 1, 16, before), window)


@pytest.mark.parametrize("window", [2, 290])
def test_packed_sequences(window) -> None:
    edges = torch.tensor([0, 30, 30, 31, 160, 420], device=DEVICE)
    compare(inputs(1, 420, 1, 16), window, edges=edges)


def test_slices_of_one_projection_are_read_in_place(monkeypatch) -> None:
    monkeypatch.setattr(Tensor, "contiguous", None)
    leaf = draw(2, 70, 3, 2, 16).float().requires_grad_()
    got = sliding_window_attention(*leaf.unbind(2), 33)
    want = sliding_window_attention_reference(*leaf.double().unbind(2), 33)
    weight = torch.randn_like(want).transpose(1, 2).clone().transpose(1, 2)
    assert error(got, want) < 1e-5
    gradients = [torch.autograd.grad(x, leaf, weight.to(x.dtype))[0] for x in (got, want)]
    assert error(gradients[0], gradients[1].double()) < 1e-5


def test_channels_apart_are_brought_together() -> None:
    compare([x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs(1, 70, 2, 16)], 20)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_nan_reaches_whoever_sees_it_and_no_other_block() -> None:
    q, k, v = (x.float().requires_grad_() for x in inputs(1, 210, 3, 16))
    with torch.no_grad():
        k[0, 90, 0] = v[0, 90, 1] = q[0, 40, 2] = float("nan")
    out = sliding_window_attention(q, k, v, 20)
    keys, values, queries = out.isnan().all(-1)[0].T
    assert keys.nonzero()[:, 0].tolist() == list(range(90, 110))
    assert queries.nonzero()[:, 0].tolist() == [40]
    # A key that is not seen has the weight 0, but 0 times a value that is no number is none.
    assert values[90:110].all()
    assert not values[:64].any()
    assert not values[128:].any()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x[:, 150:].isfinite().all() for x in gradients)


def test_deterministic() -> None:
    leaves = [x.float().requires_grad_() for x in inputs(1, 150, 1, 16)]
    runs = []
    for _ in range(2):
        out = sliding_window_attention(*leaves, 40)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed) -> None:
    leaves = [x.float().requires_grad_() for x in inputs(1, 20, 2, 16)]
    edges = torch.tensor([0, 5, 20], device=DEVICE) if packed else None
    torch.library.opcheck(_forward, (*leaves, 7, None, edges))


COMPILED = """
import torch
from based.mixers import build_mixer
from based.ops import fallback, kernels
kernels.INTERPRETING = True
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
mixer = build_mixer("sliding_window_attention", 32, num_heads=2, window=9).to(device)
x = torch.randn(2, 50, 32, device=device)
compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
gradients = []
for function in (mixer, compiled):
    mixer.zero_grad()
    for autocast in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = function(x)[0]
        y.square().sum().backward()
    gradients.append((y, *(p.grad for p in mixer.parameters())))
for want, got in zip(*gradients, strict=True):
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
"""


def test_compiled_mixer_is_the_eager_one_without_graph_breaks() -> None:
    """In a process of its own: the checks of shapes in tests are not traceable."""
    environment = {"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_no_kernel_takes_falls_back_and_says_so_once(monkeypatch) -> None:
    monkeypatch.setattr(operator, "_forward", None)
    monkeypatch.setattr(fallback, "_SAID", set())
    wide = [x.float() for x in inputs(1, 10, 1, 160)]
    with pytest.warns(UserWarning, match="head_dim 160 is over 128 in torch.float32"):
        sliding_window_attention(*wide, 4)
    sliding_window_attention(*wide, 4)
    assert _unsupported(256, torch.bfloat16) is None


def test_what_the_blocks_take_quietly(monkeypatch) -> None:
    monkeypatch.setattr(operator, "_forward", None)
    q, k, v = (x.float() for x in inputs(1, 10, 1, 16))
    sliding_window_attention(q, k, v, 4, None, None, 0.5)
    sliding_window_attention(q.double(), k.double(), v.double(), 4)
    monkeypatch.setattr(kernels, "INTERPRETING", False)
    sliding_window_attention(q.cpu(), k.cpu(), v.cpu(), 4)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        *((torch.bfloat16, head_dim) for head_dim in (16, 64, 80, 112, 128, 192, 256)),
        *((torch.float16, head_dim) for head_dim in (64, 112)),
        *((torch.float32, head_dim) for head_dim in (64, 112, 128)),
    ],
)
@pytest.mark.parametrize("window", [1, 16, 65, 129, 513, 1025, 4096])
def test_every_configuration_on_the_gpu(dtype, head_dim, window) -> None:
    compare(inputs(2, 1500, 2, head_dim), window, dtype)
    compare(inputs(1, 5000, 1, head_dim), window, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("window", [65, 129, 1025])
@pytest.mark.parametrize("head_dim", [64, 112, 128])
def test_past_keys_and_packed_sequences_on_the_gpu(window, head_dim) -> None:
    past = torch.tensor([0, window // 2, 10 * window], device=DEVICE)
    compare(inputs(3, 1500, 2, head_dim, window - 1), window, torch.bfloat16, past=past)
    edges = torch.tensor([0, 700, 700, 701, 703, 3000], device=DEVICE)
    compare(inputs(1, 3000, 2, head_dim), window, torch.bfloat16, edges=edges)


@pytest.mark.gpu
@on_gpu
def test_a_million_tokens_on_the_gpu() -> None:
    """Places beyond 2^31 elements."""
    length, window = 1 << 20, 129
    whole = torch.randn(1, length, 3, 16, 64, device=DEVICE, dtype=torch.bfloat16)
    out, _ = launch.forward(*whole.unbind(2), window, None, None)
    tail = whole[:, -500:].double()
    want = sliding_window_attention_reference(*tail.unbind(2), window)
    assert error(out[:, -200:], want[:, -200:]) <= 4e-3


@pytest.mark.gpu
@on_gpu
def test_deterministic_on_the_gpu() -> None:
    q, k, v = (x.bfloat16() for x in inputs(4, 3000, 4, 112))
    first = launch.forward(q, k, v, 129, None, None)
    gradients = launch.backward(q, k, v, 129, None, None, *first, q)
    for _ in range(5):
        again = launch.forward(q, k, v, 129, None, None)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        again = launch.backward(q, k, v, 129, None, None, *first, q)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
