"""Times of functions on one device, forward and with gradients, beside what it allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.rows import median_seconds

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
    """Bytes a second of `copy_rate`, and bfloat16 flops a second of `matmul_rate`."""

    copy: float
    product: float

    def floor(self, moved: float, flops: float = 0.0) -> float:
        """Milliseconds that no implementation can beat, from bytes and flops."""
        return 1e3 * max(moved / self.copy, flops / self.product)


def milliseconds(function: Callable[[], object], graph: bool = True) -> float:
    """Median of CUDA events around replays of a graph; the cache is cold before every one.

    Replayed, because the host's part, launch after launch, would be timed otherwise. What
    no graph can hold is called.
    """
    from triton.testing import do_bench

    call = recorded(function).replay if graph else function
    result: Any = do_bench(call, warmup=5, rep=40, return_mode="median")
    return result


def recorded(function: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """Calls as a CUDA graph, after calls that compile what is compiled at first use."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def median_device_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call; on a GPU of one among many in a row, in a graph: without the host's part."""
    if device.type != "cuda":
        return median_seconds(function)
    graph, times = recorded(function, calls=20), []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 20_000)
    return statistics.median(times[2:])


@lru_cache(maxsize=4)
def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a kernel that moves a large tensor.

    Not of `copy_`: a graph leaves that to the copy engine, which moves a third less.
    """
    count = 1 << (28 if device.type == "cuda" else 22)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    move = partial(torch.neg, source, out=target)
    return 2 * source.nbytes / median_device_seconds(move, device)


@lru_cache(maxsize=4)
def matmul_rate(device: torch.device) -> float:
    """Operations a second of a large square product in the weights' dtype."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_device_seconds(lambda: a @ a, device)


def rates() -> Rates:
    """Of this GPU."""
    device = torch.device(DEVICE)
    return Rates(copy_rate(device), matmul_rate(device))


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype, requires_grad=True)


def compiled(function: Function) -> Function:
    """As torch compiles it for this one shape: otherwise a second one would make sizes dynamic."""
    return torch.compile(function, dynamic=False)


def timed(function: Function, inputs: list[Tensor], both: bool, graph: bool = True) -> float | None:
    """Forward, or forward and backward to all inputs; None where it cannot run."""
    try:
        with torch.set_grad_enabled(both):
            if not both:
                return milliseconds(lambda: function(*inputs), graph)
            weights = [torch.randn_like(out) for out in _outputs(function(*inputs))]
            return milliseconds(
                lambda: torch.autograd.grad(_outputs(function(*inputs)), inputs, weights), graph
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
    graph: bool = True,
    **dials: int,
) -> Cells:
    """A cell for every implementation, forward and (but for some) with gradients.

    They are replayed as CUDA graphs, or called. Dials are what else the op has beside its
    sizes; they are in the rows' keys.
    """
    for both in (False, True):
        for name, function in peers.items():
            if both and name in forward_only:
                continue
            direction = "forward+backward" if both else "forward"
            sizes = {**case._asdict(), **dials}
            key = {"op": op, **sizes, "direction": direction, "implementation": name}

            def measure(function=function, both=both) -> dict[str, Any] | None:
                time = timed(function, inputs, both, graph)
                return None if time is None else {"ms": time, "floor_ms": floors[both]}

            yield key, measure
