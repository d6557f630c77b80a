"""Kernels on one GPU: Taylor linear attention, the window and the convolution, with their peers.

`python -m benchmarks.kernels`. Times are medians of CUDA events, in bfloat16, normaliser
and final state included for ours. Softmax attention (FlashAttention-2 and cuDNN, through
torch) has the same batch, heads, tokens and head_dim; flash-linear-attention's Based
kernels run if `fla` is installed. The floor is the larger of two times: q, k, v and out
(and their gradients) moved once at this GPU's copy rate, and the flops of an ideal
chunked pass at its matrix-product rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from based.ops.gated_short_convolution import gated_short_convolution
from based.ops.sliding_window_attention import sliding_window_attention
from based.ops.taylor_linear_attention import num_features, taylor_linear_attention
from benchmarks.rows import RESULTS, write_rows

FEATURE_DIM, CHUNK, WINDOW = 16, 128, 129
# Quadratic forms are not timed where a pass would take seconds.
QUADRATIC_LIMIT = 1 << 16


class Case(NamedTuple):
    """Sizes of one layer's call."""

    batch: int
    heads: int
    tokens: int
    head_dim: int


TAYLOR = (
    Case(16, 16, 4096, 64),
    Case(1, 16, 65536, 64),
    Case(16, 16, 4096, 112),
    Case(16, 16, 2048, 112),
    *(Case(65536 // tokens, 16, tokens, 64) for tokens in (512, 2048, 8192, 32768)),
    Case(1, 16, 1 << 20, 64),
)
WINDOWS = (Case(16, 16, 4096, 64), Case(16, 16, 4096, 112))
CHANNELS = 2 * 1792

Function = Callable[..., Tensor]


def milliseconds(function: Callable[[], object]) -> float:
    from triton.testing import do_bench

    result: Any = do_bench(function, warmup=5, rep=40, return_mode="median")
    return result


def rates() -> tuple[float, float]:
    """Bytes a second of a device-to-device copy, and bfloat16 flops a second of a product."""
    x = torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copied = 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) * 1e3
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return copied, 2 * 8192**3 / milliseconds(lambda: a @ a) * 1e3


def attention(backend: SDPBackend) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def taylor_peers() -> dict[str, Function]:
    """Functions of q, k [B, T, H, 16] and v [B, T, H, D]."""
    peers: dict[str, Function] = {"based": lambda q, k, v: taylor_linear_attention(q, k, v)[0]}
    if find_spec("fla") is not None:
        from fla.ops.based import (  # pyright: ignore[reportMissingImports]
            fused_chunk_based,
            parallel_based,
        )

        scale = FEATURE_DIM**-0.5
        peers["fla parallel"] = lambda q, k, v: parallel_based(q, k, v, scale, True)
        peers["fla fused_chunk"] = lambda q, k, v: fused_chunk_based(q, k, v, scale, True)
    return peers


def window_peers(case: Case) -> dict[str, Function]:
    """Functions of q, k, v [B, T, H, D]."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < WINDOW)

    mask = create_block_mask(visible, None, None, case.tokens, case.tokens, device="cuda")
    compiled: Any = torch.compile(flex_attention)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)

    return {"based": lambda q, k, v: sliding_window_attention(q, k, v, WINDOW), "flex": flex}


def timed(function: Function, inputs: list[Tensor], both: bool) -> float | None:
    """Forward, or forward and backward; None where it cannot run."""
    try:
        weight = torch.randn_like(function(*inputs))
        if not both:
            with torch.no_grad():
                return milliseconds(lambda: function(*inputs))
        return milliseconds(lambda: torch.autograd.grad(function(*inputs), inputs, weight))
    except (RuntimeError, torch.OutOfMemoryError) as error:
        Console().print(f"skipped: {str(error).splitlines()[0][:100]}")
        return None


def taylor_floor(case: Case, both: bool, copy: float, product: float) -> float:
    """Milliseconds."""
    rows, D = case.batch * case.heads * case.tokens, case.head_dim
    size = 2 * rows * (2 * FEATURE_DIM + 2 * D)
    features = num_features(FEATURE_DIM)
    flops = rows * (4 * features * (D + 1) + CHUNK * (FEATURE_DIM + D + 1))
    return 1e3 * max(size * (3 if both else 1) / copy, flops * (3 if both else 1) / product)


def rows_of(
    op: str, case: Case, peers: dict[str, Function], inputs: list[Tensor], floor: Callable
) -> Iterator[dict[str, Any]]:
    for both in (False, True):
        for name, function in peers.items():
            if "parallel" in name and case.tokens > QUADRATIC_LIMIT // 4:
                continue
            time = timed(function, inputs, both)
            if time is not None:
                yield {
                    "op": op,
                    **case._asdict(),
                    "direction": "forward+backward" if both else "forward",
                    "implementation": name,
                    "ms": time,
                    "floor_ms": floor(both),
                }


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def taylor_rows(copy: float, product: float) -> Iterator[dict[str, Any]]:
    softmax = {
        "FlashAttention-2": attention(SDPBackend.FLASH_ATTENTION),
        "cuDNN attention": attention(SDPBackend.CUDNN_ATTENTION),
    }
    for case in TAYLOR:
        B, H, T, D = case
        floor = lambda both, case=case: taylor_floor(case, both, copy, product)  # noqa: E731
        inputs = [draw(B, T, H, size) for size in (FEATURE_DIM, FEATURE_DIM, D)]
        yield from rows_of("taylor_linear_attention", case, taylor_peers(), inputs, floor)
        if T <= QUADRATIC_LIMIT:
            q, k, v = (draw(B, T, H, D) for _ in range(3))
            yield from rows_of("taylor_linear_attention", case, softmax, [q, k, v], floor)


def window_rows(copy: float) -> Iterator[dict[str, Any]]:
    for case in WINDOWS:
        B, H, T, D = case
        inputs = [draw(B, T, H, D) for _ in range(3)]
        size = 4 * inputs[0].nbytes
        floor = lambda both, size=size: 1e3 * size * (2.5 if both else 1) / copy  # noqa: E731
        yield from rows_of("sliding_window_attention", case, window_peers(case), inputs, floor)


def convolution_rows(copy: float) -> Iterator[dict[str, Any]]:
    def eager(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return gated_short_convolution(x, gate, weight)[0]

    case = Case(16, 1, 2048, CHANNELS)
    inputs = [draw(16, 2048, CHANNELS), draw(16, 2048, CHANNELS), draw(CHANNELS, 3)]
    peers: dict[str, Function] = {"based": eager, "torch.compile": torch.compile(eager)}
    size = inputs[0].nbytes
    floor = lambda both: 1e3 * size * (8 if both else 3) / copy  # noqa: E731
    yield from rows_of("gated_short_convolution", case, peers, inputs, floor)


def main() -> None:
    copy, product = rates()
    Console().print(f"copy {copy / 1e12:.2f} TB/s, product {product / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for source in (taylor_rows(copy, product), window_rows(copy), convolution_rows(copy)):
        for row in source:
            rows.append({**row, "copy_tb_s": copy / 1e12, "product_tflop_s": product / 1e12})
            write_rows("kernels", rows)
    show(rows)
    plot(rows)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("op", "batch, heads, tokens, dim", "direction", "implementation", "ms", "floor")
    for row in rows:
        sizes = ", ".join(str(row[name]) for name in Case._fields)
        numbers = (f"{row['ms']:.3f}", f"{row['floor_ms']:.3f}")
        table.add_row(row["op"], sizes, row["direction"], row["implementation"], *numbers)
    Console(width=140).print(table)


def plot(rows: list[dict[str, Any]]) -> None:
    """Taylor linear attention at 65,536 tokens a head: time a token against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, direction in zip(figure.subplots(1, 2), ("forward", "forward+backward"), strict=True):
        part = [
            row
            for row in rows
            if row["op"] == "taylor_linear_attention"
            and row["direction"] == direction
            and row["head_dim"] == 64
            and row["batch"] * row["tokens"] in (1 << 16, 1 << 20)
            and (row["batch"], row["tokens"]) != (16, 4096)
        ]
        for name in dict.fromkeys(row["implementation"] for row in part):
            mine = sorted((r for r in part if r["implementation"] == name), key=_tokens)
            times = [1e6 * row["ms"] / (row["batch"] * row["tokens"]) for row in mine]
            axes.loglog([row["tokens"] for row in mine], times, "o-", label=name)
        ours = sorted((r for r in part if r["implementation"] == "based"), key=_tokens)
        floors = [1e6 * row["floor_ms"] / (row["batch"] * row["tokens"]) for row in ours]
        axes.loglog([row["tokens"] for row in ours], floors, "k:", label="floor")
        axes.set(title=direction, xlabel="tokens of a sequence", ylabel="ns a token, 16 heads")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "kernels.png", dpi=120)


def _tokens(row: dict[str, Any]) -> int:
    return row["tokens"]


if __name__ == "__main__":
    main()
