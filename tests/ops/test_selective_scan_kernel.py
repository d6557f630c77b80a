import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from based.ops.lanes import lanes_as_rows
from based.ops.selective_scan import selective_scan
from based.ops.selective_scan.triton import selective_scan_kernel

# Without a GPU the kernels are interpreted.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("length", "channels", "states"), [(1, 5, 3), (16, 32, 4), (37, 40, 6)])
def test_the_kernels_are_the_scan_and_its_gradients(
    length: int, channels: int, states: int
) -> None:
    shapes = [(length, channels), (length, channels), (length, states), (length, states)]
    x, delta, b, c = (torch.randn(2, *shape) for shape in shapes)
    A, state = -3 * torch.rand(channels, states), torch.randn(2, channels, states)
    given = [x, delta.abs() * 0.3, A, b, c, state]
    mine = [tensor.clone().to(DEVICE).requires_grad_() for tensor in given]
    exact = [tensor.double().requires_grad_() for tensor in given]
    weights = [torch.randn(2, length, channels), torch.randn(2, channels, states)]

    def weighed(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return sum((y * w.to(y)).sum() for y, w in zip(outputs, weights, strict=True))

    got = selective_scan_kernel(mine[0], mine[1], mine[2].expand(2, -1, -1), *mine[3:])
    want = selective_scan(*exact)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # where no states are kept
        alone = selective_scan_kernel(mine[0], mine[1], mine[2].expand(2, -1, -1), *mine[3:])
    assert all(torch.equal(one, other) for one, other in zip(alone, got, strict=True))
    got_gradients = torch.autograd.grad(weighed(got), mine)
    want_gradients = torch.autograd.grad(weighed(want), exact)
    for one, other in zip(got_gradients, want_gradients, strict=True):
        assert (one.cpu() - other).abs().max() < 1e-5 * other.abs().max().clamp(min=1)


def test_rows_of_different_models_are_one_batch() -> None:
    """Under vmap every lane has decay rates of its own; gradients come back to each."""
    rates = -torch.rand(3, 5, 2, dtype=torch.float64, requires_grad=True)
    x, delta = torch.randn(2, 3, 4, 9, 5, dtype=torch.float64)
    b, c = torch.randn(2, 3, 4, 9, 2, dtype=torch.float64)
    inputs = (x, delta.abs(), rates, b, c)
    stacked = torch.vmap(lambda *lane: selective_scan(*lane)[0])(*inputs)
    apart = torch.stack([selective_scan(*lane)[0] for lane in zip(*inputs, strict=True)])
    torch.testing.assert_close(stacked, apart, rtol=0, atol=1e-12)
    weight = torch.randn_like(stacked)
    (got,) = torch.autograd.grad((stacked * weight).sum(), rates)
    (want,) = torch.autograd.grad((apart * weight).sum(), rates)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_compiler_takes_the_kernels_as_they_are() -> None:
    """Traced below vmap and autograd, where the launches are two operators."""
    scan = lanes_as_rows(selective_scan_kernel)

    def gradient(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        y, _ = torch.vmap(scan)(leaf, leaf.abs(), A, b, b, torch.zeros_like(A))
        return torch.autograd.grad(y.square().sum(), leaf)[0]

    inputs = torch.randn(2, 1, 3, 2), -torch.rand(2, 1, 2, 2), torch.randn(2, 1, 3, 2)
    inputs = tuple(tensor.to(DEVICE) for tensor in inputs)
    graph = make_fx(gradient)(*inputs)
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("based.selective_scan.default") == 1
    assert names.count("based.selective_scan_backward.default") == 1
    compiled = torch.compile(graph, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), gradient(*inputs), rtol=0, atol=0)
