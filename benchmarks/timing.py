"""Times of functions on one GPU, forward and with gradients, beside what the hardware allows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

Function = Callable[..., Any]
# Keys of rows, and how each is measured; None where it cannot be.
Cells = Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any] | None]]]
DEVICE = "cuda"


class Case(NamedTuple):
    """Sizes of one layer's call; without heads, head_dim is the channels."""

    batch: int
    heads: int
    tokens: int
    head_dim: int


class Rates(NamedTuple):
    """Bytes a second of a device-to-device copy, and bfloat16 flops a second of a product."""

    copy: float
    product: float

    def floor(self, moved: float, flops: float = 0.0) -> float:
        """Milliseconds that no implementation can beat, from bytes and flops."""
        return 1e3 * max(moved / self.copy, flops / self.product)


def milliseconds(function: Callable[[], object]) -> float:
    """Median of CUDA events around replays of a graph; the cache is cold before every one.

    Replayed, because the host's part, launch after launch, would be timed otherwise.
    """
    return _median(recorded(function).replay)


def _median(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    result: Any = do_bench(call, warmup=5, rep=40, return_mode="median")
    return result


def recorded(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """One call as a CUDA graph, after calls that compile what is compiled at first use."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def rates() -> Rates:
    """Of this GPU."""
    x = torch.randn(1 << 28, device=DEVICE, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    # Eager: in a graph a copy is left to the copy engine, which is slower.
    copied = 2 * x.nbytes / _median(lambda: y.copy_(x)) * 1e3
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    return Rates(copied, 2 * 8192**3 / _median(lambda: a @ a) * 1e3)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype, requires_grad=True)


def compiled(function: Function) -> Function:
    """As torch compiles it for this one shape: otherwise a second one would make sizes dynamic."""
    return torch.compile(function, dynamic=False)


def timed(function: Function, inputs: list[Tensor], both: bool) -> float | None:
    """Forward, or forward and backward to all inputs; None where it cannot run."""
    try:
        with torch.set_grad_enabled(both):
            if not both:
                return milliseconds(lambda: function(*inputs))
            weights = [torch.randn_like(out) for out in _outputs(function(*inputs))]
            return milliseconds(
                lambda: torch.autograd.grad(_outputs(function(*inputs)), inputs, weights)
            )
    except (RuntimeError, torch.OutOfMemoryError) as error:
        Console().print(f"skipped: {str(error).splitlines()[0][:100]}")
        return None


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def rows_of(
    op: str,
    case: Case,
    peers: dict[str, Function],
    inputs: list[Tensor],
    floors: tuple[float, float],
    forward_only: Collection[str] = (),
    **dials: int,
) -> Cells:
    """A cell for every implementation, forward and (but for some) with gradients.

    Dials are what else the op has beside its sizes; they are in the rows' keys.
    """
    for both in (False, True):
        for name, function in peers.items():
            if both and name in forward_only:
                continue
            direction = "forward+backward" if both else "forward"
            sizes = {**case._asdict(), **dials}
            key = {"op": op, **sizes, "direction": direction, "implementation": name}

            def measure(function=function, both=both) -> dict[str, Any] | None:
                time = timed(function, inputs, both)
                return None if time is None else {"ms": time, "floor_ms": floors[both]}

            yield key, measure
