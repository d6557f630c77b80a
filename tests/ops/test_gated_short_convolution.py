"""The gated short convolution's kernels and operator against float64: interpreted, or on a GPU."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from based.ops import fallback, kernels
from based.ops.gated_short_convolution import gated_short_convolution, operator, shifted
from based.ops.gated_short_convolution.operator import _forward
from based.ops.gated_short_convolution.reference import gated_short_convolution_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest relative Frobenius errors: outputs, then gradients.
LIMITS = {
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (4e-3, 1e-2),
    torch.float16: (1e-3, 1e-3),
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETING", DEVICE == "cpu")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-3)).item()


def reference(
    projected: Tensor, weight: Tensor, past: Tensor, edges: list[int] | None
) -> list[Tensor]:
    """Outputs and next state; a packed sequence at a time."""
    if edges is None:
        return list(gated_short_convolution_reference(projected, weight, past))
    outs, afters = [], []
    for before, (a, b) in zip(past.split(1), pairwise(edges), strict=True):
        after = before
        if b > a:
            y, after = gated_short_convolution_reference(projected[:, a:b], weight, before)
            outs.append(y)
        afters.append(after)
    return [torch.cat(outs, dim=1), torch.cat(afters)]


def compare(
    projected: Tensor,
    weight: Tensor,
    past: Tensor | None = None,
    edges: list[int] | None = None,
) -> None:
    """Outputs, next state and all gradients, on the same rounded inputs."""
    given = [x for x in (projected, weight, past) if x is not None]
    wide = [x.detach().double().requires_grad_() for x in given]
    rows = len(projected) if edges is None else len(edges) - 1
    start = (
        wide[2] if past is not None else wide[0].new_zeros(rows, weight.shape[1] - 1, len(weight))
    )
    want, after = reference(wide[0], wide[1], start, edges)
    cu_seqlens = None if edges is None else torch.tensor(edges, device=DEVICE)
    got, state = gated_short_convolution(projected, weight, past, cu_seqlens)
    of_out, of_gradients = LIMITS[projected.dtype]
    assert got.dtype == projected.dtype
    assert error(got, want) <= of_out
    d_out = torch.randn_like(want).to(got.dtype)
    results, gradients = [got], [d_out]
    if past is not None:
        assert torch.equal(state.double(), after)
        # What comes back through the next state meets what comes through the outputs.
        results, gradients = [got, state], [d_out, torch.randn_like(state)]
    wanted = [want, after][: len(results)]
    wanted = torch.autograd.grad(wanted, wide, [d.double() for d in gradients])
    for a, b, x in zip(torch.autograd.grad(results, given, gradients), wanted, given, strict=True):
        assert a.dtype == x.dtype
        assert error(a, b) <= of_gradients


@pytest.mark.parametrize("length", [1, 2, 3, 7, 63])
def test_lengths(length: int) -> None:
    compare(draw(1, length, 10), draw(5, 3))


@pytest.mark.parametrize("length", [1, 2, 3, 65])
def test_lengths_after_a_state(length: int) -> None:
    compare(draw(1, length, 10), draw(5, 3), draw(1, 2, 5))


def test_a_long_row_in_the_longest_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("based.ops.gated_short_convolution.triton.PROGRAMS", 1)
    compare(draw(1, 201, 6), draw(3, 3))
    projected, weight = draw(1, 1000, 6).detach(), draw(3, 3).detach()
    want, _ = gated_short_convolution_reference(
        projected.double(), weight.double(), torch.zeros(1, 2, 3, device=DEVICE).double()
    )
    assert error(gated_short_convolution(projected, weight)[0], want) <= LIMITS[torch.float32][0]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("with_past", [False, True])
def test_widths(width: int, with_past: bool) -> None:
    compare(draw(2, 11, 14), draw(7, width), draw(2, width - 1, 7) if with_past else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_several_blocks_of_channels(dtype: torch.dtype) -> None:
    compare(draw(1, 6, 1026, dtype=dtype), draw(513, 3, dtype=dtype), draw(1, 2, 513, dtype=dtype))


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("with_past", [False, True])
def test_packed_sequences(width: int, with_past: bool) -> None:
    """Empty ones, some shorter than the convolution, and edges inside a group of tokens."""
    edges = [0, 0, 1, 3, 3, 14, 15, 24, 24]
    past = draw(len(edges) - 1, width - 1, 5) if with_past else None
    compare(draw(1, 24, 10), draw(5, width), past, edges)


def test_strided_projections_and_gradients_are_read_in_place() -> None:
    whole, weight = torch.randn(2, 5, 24, device=DEVICE), draw(5, 3).detach()
    for projected in (whole[..., 4:14], whole[:, ::2, 10:20], whole.transpose(0, 1)[..., :10]):
        compare(projected.detach().requires_grad_(), weight.requires_grad_())
    x = draw(1, 9, 10)
    y, _ = gated_short_convolution(x, weight.detach())
    (one,) = torch.autograd.grad(y.sum(), x)
    y, _ = gated_short_convolution(x, weight.detach())
    (other,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(one, other)


def test_channels_that_are_not_neighbours() -> None:
    projected = torch.randn(1, 10, 9, device=DEVICE).transpose(1, 2)
    weight = torch.randn(3, 5, device=DEVICE).T
    compare(projected.requires_grad_(), weight.requires_grad_())


def test_a_nan_reaches_what_sees_it_and_stays_in_its_sequence() -> None:
    projected, weight = draw(1, 30, 8).detach(), draw(4, 3).detach()
    projected[0, 12, 1] = projected[0, 19, 6] = float("nan")
    projected.requires_grad_()
    edges = torch.tensor([0, 10, 20, 30], device=DEVICE)
    y, _ = gated_short_convolution(projected, weight, None, edges)
    lost = y.isnan()[0].nonzero().tolist()
    assert lost == [[12, 1], [13, 1], [14, 1], [19, 2]]
    (gradient,) = torch.autograd.grad(y, projected, torch.ones_like(y))
    # Of the inputs 10 to 14 that share an output with it, and of the gates of its outputs.
    lost = gradient.isnan()[0, :, [1, 5]].nonzero().tolist()
    assert lost == [[10, 0], [11, 0], [12, 0], [12, 1], [13, 0], [13, 1], [14, 0], [14, 1]]
    assert not gradient.isnan()[0, 20:].any()


def test_repeated_calls_are_equal_to_the_last_bit() -> None:
    inputs = draw(1, 10, 1200, dtype=torch.bfloat16), draw(600, 3, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        y, _ = gated_short_convolution(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool) -> None:
    edges = torch.tensor([0, 4, 6], device=DEVICE) if packed else None
    past = draw(2, 2, 5) if packed else None
    torch.library.opcheck(_forward, (draw(1, 6, 10), draw(5, 3), past, edges))


COMPILED = """
import os
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
os.environ["TRITON_INTERPRET"] = str(int(device == "cpu"))
from based.mixers import build_mixer
from based.ops import kernels
from based.ops.gated_short_convolution import triton
kernels.INTERPRETING = device == "cpu"
torch.manual_seed(0)
calls, forward = [], triton.forward
triton.forward = lambda *inputs: calls.append(1) or forward(*inputs)
x = torch.randn(1, 7, 8, device=device)
for kernel_size, kernels_called in ((3, 4), (9, 0)):
    mixer = build_mixer("gated_convolution", 8, kernel_size=kernel_size).to(device)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (compiled, mixer):
        mixer.zero_grad()
        for autocast in (False, True):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                y = function(x)[0]
            y.square().sum().backward()
        gradients.append((y, *(p.grad for p in mixer.parameters())))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    assert len(calls) == kernels_called, calls
    calls.clear()
"""


def test_compiled_mixer_is_the_eager_one_without_graph_breaks() -> None:
    """In a process of its own: the checks of shapes in tests are not traceable."""
    command = [sys.executable, "-W", "always", "-c", COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("UserWarning: The gated short convolution takes the slower") == 1


def test_what_no_kernel_takes_is_said_once_and_computed_in_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fallback, "_SAID", set())
    with pytest.warns(UserWarning, match="kernel_size 9 is over 8"):
        compare(draw(1, 12, 6), draw(3, 9))
    compare(draw(1, 12, 6), draw(3, 9))


def test_what_takes_the_pytorch_form_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_forward", None)
    y, after = gated_short_convolution(draw(2, 0, 6), draw(3, 3), draw(2, 2, 3))
    assert y.shape == (2, 0, 3)
    assert after.shape == (2, 2, 3)
    gated_short_convolution(draw(2, 4, 6).double(), draw(3, 3).double())
    monkeypatch.setattr(kernels, "INTERPRETING", False)
    gated_short_convolution(draw(2, 4, 6).cpu(), draw(3, 3).cpu())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("channels", [1, 1000, 3584])
@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_every_configuration_on_the_gpu(dtype: torch.dtype, channels: int, width: int) -> None:
    """Stretches of several lengths, with a state, packed and not."""
    weight, past = draw(channels, width, dtype=dtype), draw(3, width - 1, channels, dtype=dtype)
    for length in (1, 65, 1000):
        compare(draw(3, length, 2 * channels, dtype=dtype), weight)
        compare(draw(3, length, 2 * channels, dtype=dtype), weight, past)
        edges = [0, length // 3, length // 3, length]
        compare(draw(1, length, 2 * channels, dtype=dtype), weight, past, edges)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_training_sizes_of_based_1_3b() -> None:
    projected, weight = (
        draw(*shape, dtype=torch.bfloat16) for shape in ((16, 2048, 7168), (3584, 3))
    )
    wide = [x.detach().double().requires_grad_() for x in (projected, weight)]
    got, want = (
        gated_short_convolution(projected, weight)[0],
        shifted.gated_short_convolution(*wide),
    )
    d_out = torch.randn_like(got)
    assert error(got, want) <= LIMITS[torch.bfloat16][0]
    gradients = torch.autograd.grad(got, (projected, weight), d_out)
    for a, b in zip(gradients, torch.autograd.grad(want, wide, d_out.double()), strict=True):
        assert error(a, b) <= LIMITS[torch.bfloat16][1]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_more_elements_than_32_bits_count() -> None:
    """2^20 tokens of based-1.3b: most rows begin beyond 2^31 elements."""
    projected = torch.randn(1, 1 << 20, 7168, device=DEVICE, dtype=torch.bfloat16)
    projected.requires_grad_()
    weight = draw(3584, 3, dtype=torch.bfloat16)
    y, _ = gated_short_convolution(projected, weight)
    (gradient,) = torch.autograd.grad(y, projected, torch.ones_like(y))
    tail = projected[:, -70:].detach().requires_grad_()
    want, _ = gated_short_convolution(tail, weight)
    (wanted,) = torch.autograd.grad(want, tail, torch.ones_like(want))
    torch.testing.assert_close(y[:, -64:], want[:, -64:])
    torch.testing.assert_close(gradient[:, -64:], wanted[:, -64:])
