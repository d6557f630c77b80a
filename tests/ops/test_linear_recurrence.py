"""The shared kernels of decayed linear attention and the delta rules, against float64 chunks."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from based.ops import kernels, peers
from based.ops.decayed_linear_attention import decayed_linear_attention
from based.ops.delta_rule import delta_rule, generalized_delta_rule

# Without a GPU the kernels are interpreted.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, H = 2, 2


@pytest.fixture(autouse=True)
def _with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETING", DEVICE == "cpu")
    # A peer's kernels would take 16 bits first, and choose among theirs for minutes.
    monkeypatch.setattr(peers, "installed", lambda *_: None)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def decayed(T: int, K: int, V: int, decays: int, heads: int = H) -> tuple[Tensor, ...]:
    """Some decays are so strong that nothing is left after a token."""
    g = F.logsigmoid(3 * randn(B, T, H, decays)) * torch.tensor([1.0, 9.0])[:, None]
    return randn(B, T, heads, K), randn(B, T, heads, K), randn(B, T, H, V), g, randn(B, H, K, V)


def delta(T: int, K: int, V: int) -> tuple[Tensor, ...]:
    q, k, v, g, state = decayed(T, K, V, 1)
    beta = 2 * torch.rand(B, T, H, dtype=torch.float64)
    return q, F.normalize(k, dim=-1), v, beta, g[..., 0], state


def generalized(T: int, K: int, V: int) -> tuple[Tensor, ...]:
    q, k, v, g, state = decayed(T, K, V, K)
    a = F.normalize(randn(B, T, H, K), dim=-1)
    return q, k, v, -a, a * torch.rand_like(a) * g.exp(), g, state


CASES: dict[str, tuple[Callable, Callable]] = {
    "decay a head": (decayed_linear_attention, partial(decayed, decays=1)),
    "shared keys": (decayed_linear_attention, partial(decayed, decays=1, heads=1)),
    "decay a channel": (decayed_linear_attention, lambda T, K, V: decayed(T, K, V, K)),
    "delta": (delta_rule, delta),
    "generalized delta": (generalized_delta_rule, generalized),
}
every_case = pytest.mark.parametrize(("op", "make"), CASES.values(), ids=CASES)


def with_gradients(op: Callable, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a fixed weighted sum of them."""
    outputs = op(*leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    weighed = [(y * weight.to(y)).sum() for y, weight in zip(outputs, weights, strict=True)]
    return [*outputs, *torch.autograd.grad(weighed, leaves)]


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        error = (one.cpu().double() - other).norm() / other.norm()
        assert error < tolerance, f"differs by {error:.1e}"


@every_case
@pytest.mark.parametrize(("T", "K", "V"), [(1, 8, 5), (16, 16, 16), (35, 24, 70)])
def test_outputs_state_and_gradients(op: Callable, make: Callable, T: int, K: int, V: int) -> None:
    torch.manual_seed(T)
    exact = [x.requires_grad_() for x in make(T, K, V)]
    mine = [x.detach().float().to(DEVICE).requires_grad_() for x in exact]
    # A GPU has three TF32 products for one of float32.
    assert_close(with_gradients(op, mine), with_gradients(op, exact), 2e-5)


@every_case
def test_sixteen_bits(op: Callable, make: Callable) -> None:
    torch.manual_seed(0)
    *inputs, state = make(17, 16, 16)
    mine = [x.bfloat16().to(DEVICE).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in mine]
    states = [state.float().to(DEVICE).requires_grad_(), state.requires_grad_()]
    got = with_gradients(op, [*mine, states[0]])
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    assert_close(got, with_gradients(op, [*exact, states[1]]), 1e-2)


@every_case
def test_lanes_are_one_batch(op: Callable, make: Callable) -> None:
    torch.manual_seed(0)
    lanes = [make(9, 8, 8) for _ in range(2)]
    stacked = [torch.stack(parts).float().to(DEVICE) for parts in zip(*lanes, strict=True)]
    got = torch.vmap(op)(*stacked)
    want = [op(*lane) for lane in lanes]
    for one, others in zip(got, zip(*want, strict=True), strict=True):
        assert_close([one], [torch.stack(others)], 1e-5)


def test_not_contiguous_and_nothing_to_begin_with() -> None:
    x = randn(B, 20, H, 3, 16).float().to(DEVICE)
    q, k, v = x.unbind(3)
    beta = torch.rand(B, 20, H, device=DEVICE)
    got, _ = delta_rule(q, F.normalize(k, dim=-1), v.transpose(-1, -2).mT, beta)
    exact = [y.cpu().double() for y in (q, F.normalize(k, dim=-1), v, beta)]
    assert_close([got], [delta_rule(*exact)[0]], 1e-5)


def test_a_long_sequence_with_strong_and_weak_decays() -> None:
    torch.manual_seed(0)
    q, k, v, g, state = decayed(150, 16, 16, 16)
    g = g.where(torch.rand_like(g) < 0.1, -1e-3)
    exact = [x.requires_grad_() for x in (q, k, v, g, state)]
    mine = [x.detach().float().to(DEVICE).requires_grad_() for x in exact]
    op = decayed_linear_attention
    assert_close(with_gradients(op, mine), with_gradients(op, exact), 1e-5)


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_a_delta_rule_over_several_chunks_of_keys_that_are_alike(alike: float) -> None:
    torch.manual_seed(0)
    q, k, v, beta, g, state = delta(70, 16, 16)
    k = F.normalize((1 - alike) * k + alike * k[:, :1], dim=-1)
    exact = [x.requires_grad_() for x in (q, k, v, beta / 2, g / 50, state)]
    mine = [x.detach().float().to(DEVICE).requires_grad_() for x in exact]
    assert_close(with_gradients(delta_rule, mine), with_gradients(delta_rule, exact), 2e-5)


def test_a_nan_stays_in_its_row_and_column() -> None:
    q, k, v, g, state = (x.float().to(DEVICE) for x in decayed(70, 16, 16, 1))
    v[0, 66, 0, 3] = float("nan")
    out, last = decayed_linear_attention(q, k, v, g, state)
    # Within a chunk products mix what their weights then keep apart.
    assert out[0, :64].isfinite().all()
    assert out[0, 66:, 0, 3].isnan().all()
    assert last[0, 0, :, 3].isnan().all()
    assert out[1].isfinite().all()
    assert out[0, :, 1].isfinite().all()
    assert out[0, :, 0, :3].isfinite().all()


def test_nothing_is_kept_where_nothing_is_learned() -> None:
    inputs = [x.float().to(DEVICE) for x in delta(20, 16, 16)]
    with torch.no_grad():
        got = delta_rule(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    for one, other in zip(got, delta_rule(*leaves), strict=True):
        assert one.equal(other)


def test_a_compiler_takes_the_launches_as_they_are() -> None:
    def gradient(q: Tensor, state: Tensor) -> Tensor:
        leaf = q.detach().requires_grad_()
        y, _ = decayed_linear_attention(leaf, leaf, leaf, -leaf[..., :1].abs(), state)
        return torch.autograd.grad(y.square().sum(), leaf)[0]

    inputs = [x.float().to(DEVICE) for x in (randn(1, 5, 1, 4), randn(1, 1, 4, 4))]
    graph = make_fx(gradient)(*inputs)
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("based.linear_recurrence.default") == 1
    assert names.count("based.linear_recurrence_backward.default") == 1


COMPILED = """
import os
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
os.environ["TRITON_INTERPRET"] = str(int(device == "cpu"))
from based.mixers import build_mixer
from based.ops import kernels, peers
kernels.INTERPRETING = device == "cpu"
peers.installed = lambda *_: None
torch.manual_seed(0)
MIXERS = {
    "gated_delta_net": {"num_heads": 2},
    "rwkv7": {"head_dim": 16},
}
x = torch.randn(1, 9, 32, device=device)
for name, options in MIXERS.items():
    torch._dynamo.reset()
    mixer = build_mixer(name, 32, **options).to(device)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, mixer):
        mixer.zero_grad()
        for autocast in (False, True):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                y = function(x)[0]
            y.square().sum().backward()
        found.append((y, *(p.grad for p in mixer.parameters())))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
"""


def test_mixers_on_these_kernels_compile_whole() -> None:
    """In a process of its own: the checks of shapes in tests are not traceable."""
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
