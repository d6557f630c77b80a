"""The operator: what torch.compile, autocast and opcheck see."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from based.ops import fallback
from based.ops.taylor_linear_attention import chunked, operator
from based.ops.taylor_linear_attention.operator import _forward, _takes_kernels, _unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(length: int = 40, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> list:
    sizes = (16, 16, head_dim)
    return [
        torch.randn(2, length, 2, size, device=DEVICE, dtype=dtype, requires_grad=True)
        for size in sizes
    ]


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("want_state", [False, True])
def test_opcheck(length, want_state) -> None:
    arguments = (*inputs(length), None, None, None, want_state)
    torch.library.opcheck(_forward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_the_operator(with_state, packed) -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in inputs())
    edges, rows = None, 2
    if packed:
        q, k, v = (x.detach()[:1].requires_grad_() for x in (q, k, v))
        edges, rows = torch.tensor([0, 7, 40], device=DEVICE), 2
    state = []
    if with_state:
        shape = (rows, 2, 153)
        state = [torch.rand(*shape, 16, device=DEVICE), torch.rand(*shape, device=DEVICE) + 1]
        state = [x.double().requires_grad_() for x in state]
    leaves = [q, k, v, *state]
    start = state or [None, None]
    wanted = chunked.taylor_linear_attention(q, k, v, *start, edges)
    got = _forward(q, k, v, *start, edges, True)[:3]
    weights = [torch.randn_like(x) for x in wanted]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    want = torch.autograd.grad(wanted, leaves, weights)
    for a, b in zip(torch.autograd.grad(got, leaves, weights), want, strict=True):
        torch.testing.assert_close(a, b)


COMPILED = """
import torch
from based.mixers import build_mixer
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
mixer = build_mixer("taylor_linear_attention", 32, num_heads=2).to(device)
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
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ((7, 64, torch.float32), "feature_dim 7 is not one of (8, 16, 24, 32)"),
        ((16, 300, torch.float32), "head_dim 300 is over 256"),
        ((16, 192, torch.float32), "float32 with a head_dim over 128, at feature_dim 16"),
        ((32, 112, torch.float32), "float32 with a head_dim over 64, at feature_dim 32"),
        ((16, 112, torch.bfloat16), None),
        ((16, 112, torch.bfloat16, 163 * 1024), None),
        (
            (16, 112, torch.bfloat16, 99 * 1024),
            "feature_dim 16 with head_dim 112 in torch.bfloat16 takes 128 KB of shared memory, "
            "and this GPU has 99",
        ),
        ((32, 64, torch.float16, 99 * 1024), None),
        (
            (24, 65, torch.bfloat16, 163 * 1024),
            "feature_dim 24 with head_dim 65 in torch.bfloat16 takes 168 KB of shared memory, "
            "and this GPU has 163",
        ),
    ],
)
def test_what_no_kernel_takes(call, reason: str | None) -> None:
    assert _unsupported(*call) == reason


def test_what_no_kernel_takes_is_said_once(monkeypatch) -> None:
    monkeypatch.setattr(fallback, "_SAID", set())
    with FakeTensorMode():
        q, v = (torch.empty(1, 2, 1, size, device="cuda") for size in (7, 4))
    with pytest.warns(UserWarning, match="slower PyTorch path: feature_dim 7 is not one of"):
        assert not _takes_kernels(q, v)
    assert not _takes_kernels(q, v)


def test_cpu_tensors_take_the_chunked_form(monkeypatch) -> None:
    monkeypatch.setattr(operator, "_forward", None)
    q, k, v = (x.cpu() for x in inputs())
    operator.taylor_linear_attention(q, k, v)
    operator.taylor_linear_attention_outputs(q, k, v)
