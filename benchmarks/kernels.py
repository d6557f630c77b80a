"""Kernels on one GPU, with their peers: attention, recurrences and what stands around them.

    python -m benchmarks.kernels
    python -m benchmarks.kernels gated_short_convolution rotary

Times are medians of replayed CUDA graphs (`timing.py`), in bfloat16 (`recurrences.py` in float32
too), normaliser and final state included for ours. Each is a row of results/kernels.jsonl as
soon as it is made; a row that this device has at this commit is not measured again. Softmax
attention (FlashAttention-2, cuDNN, through torch) has the same batch, heads, tokens and head_dim;
flash-linear-attention's Based kernels run if `fla` is installed, and ThunderKittens' (the
numerator alone, launch by launch) with `--thunderkittens CHECKOUT`. The floor is the larger of
two times: all inputs, outputs and gradients moved once at this GPU's copy rate, and the
flops of an ideal pass (for Taylor linear attention a chunked one) at its matrix-product
rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from based.ops import kernels
from based.ops.sliding_window_attention import blocked, sliding_window_attention
from based.ops.taylor_linear_attention import num_features, taylor_linear_attention
from benchmarks import pointwise, recurrences, thunderkittens
from benchmarks.rows import RESULTS, add_row, device_name, device_rows, has_row
from benchmarks.timing import Case, Cells, Function, Rates, compiled, draw, rates, rows_of

FEATURE_DIM, CHUNK = 16, 128
# Quadratic forms are not timed where a pass would take seconds.
QUADRATIC_LIMIT = 1 << 16
TAYLOR = (
    Case(16, 16, 4096, 64),
    Case(1, 16, 65536, 64),
    Case(16, 16, 4096, 112),
    Case(16, 16, 2048, 112),
    *(Case(65536 // tokens, 16, tokens, 64) for tokens in (512, 2048, 8192, 32768)),
    Case(1, 16, 1 << 20, 64),
)
WINDOWS = (
    *((Case(16, 16, 4096, head_dim), w) for head_dim in (64, 112) for w in (65, 129, 513, 2049)),
    (Case(16, 16, 4096, 128), 129),
)


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


def window_peers(window: int) -> dict[str, Function]:
    """Functions of q, k, v [B, T, H, D]."""

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.shape[1]
        return torch.ops.aten._flash_attention_forward(
            *(q, k, v, None, None, T, T, 0.0, False, False),
            window_size_left=window - 1,
            window_size_right=0,
        )[0]

    peers: dict[str, Function] = {
        "based": lambda q, k, v: sliding_window_attention(q, k, v, window),
        "PyTorch blocks": lambda q, k, v: blocked.sliding_window_attention(q, k, v, window),
        "windowed FlashAttention-2": flash,
    }
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        peers["flash-attn"] = lambda q, k, v: flash_attn_func(
            q, k, v, causal=True, window_size=(window - 1, 0)
        )
    return peers


def flex(window: int, tokens: int) -> Function:
    """FlexAttention: a function of q, k, v [B, H, T, D], the layout that it is made for."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    mask = create_block_mask(visible, None, None, tokens, tokens, device="cuda")
    # Only so many masks are compiled before torch gives up.
    torch.compiler.reset()
    attend = compiled(flex_attention)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


def taylor_floor(case: Case, rates: Rates) -> tuple[float, float]:
    """Milliseconds forward, and forward and backward."""
    rows, D = case.batch * case.heads * case.tokens, case.head_dim
    size = 2 * rows * (2 * FEATURE_DIM + 2 * D)
    features = num_features(FEATURE_DIM)
    flops = rows * (4 * features * (D + 1) + CHUNK * (FEATURE_DIM + D + 1))
    return rates.floor(size, flops), rates.floor(3 * size, 3 * flops)


def taylor(rates: Rates, checkout: Path | None = None) -> Cells:
    softmax = {
        "FlashAttention-2": attention(SDPBackend.FLASH_ATTENTION),
        "cuDNN attention": attention(SDPBackend.CUDNN_ATTENTION),
    }
    kittens = None if checkout is None else thunderkittens.load(checkout)
    for case in TAYLOR:
        B, H, T, D = case
        peers, floors = taylor_peers(), taylor_floor(case, rates)
        if T > QUADRATIC_LIMIT // 4:
            peers.pop("fla parallel", None)
        inputs = [draw(B, T, H, size) for size in (FEATURE_DIM, FEATURE_DIM, D)]
        yield from rows_of("taylor_linear_attention", case, peers, inputs, floors)
        triton = {"based in Triton": peers["based"]}
        for key, measure in rows_of("taylor_linear_attention", case, triton, inputs, floors):
            yield key, partial(without_hopper, measure)
        if kittens is not None and thunderkittens.takes(case):
            own = [draw(B, H, T, size) for size in (FEATURE_DIM, FEATURE_DIM, D)]
            yield from kittens_rows(kittens, case, own, floors)
        if T <= QUADRATIC_LIMIT:
            q, k, v = (draw(B, T, H, D) for _ in range(3))
            yield from rows_of("taylor_linear_attention", case, softmax, [q, k, v], floors)


def without_hopper(measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """What the Triton kernels take, where those for Hopper would run."""
    kernels.HOPPER = False
    try:
        return measure()
    finally:
        kernels.HOPPER = True


def kittens_rows(
    kittens: Function, case: Case, inputs: list[Tensor], floors: tuple[float, float]
) -> Cells:
    """Forward alone, called: its kernel waits for the device, so that no graph can hold it."""
    peer, name = {"ThunderKittens": kittens}, ("ThunderKittens",)
    return rows_of("taylor_linear_attention", case, peer, inputs, floors, name, graph=False)


def windows(rates: Rates) -> Cells:
    op = "sliding_window_attention"
    for case, window in WINDOWS:
        B, H, T, D = case
        size = 4 * 2 * B * H * T * D
        flops = 4 * D * B * H * (window * T - window * (window - 1) // 2)
        floors = rates.floor(size, flops), rates.floor(3 * size, 3.5 * flops)
        inputs = [draw(B, T, H, D) for _ in range(3)]
        yield from rows_of(op, case, window_peers(window), inputs, floors, window=window)
        inputs = [draw(B, H, T, D) for _ in range(3)]
        peers = {"FlexAttention": flex(window, T)}
        yield from rows_of(op, case, peers, inputs, floors, window=window)


OPS: dict[str, Callable[[Rates], Cells]] = {
    "taylor_linear_attention": taylor,
    "sliding_window_attention": windows,
    **pointwise.OPS,
    **recurrences.OPS,
}


@dataclass(frozen=True)
class Options:
    """Which kernels are timed."""

    ops: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(OPS)
    thunderkittens: Path | None = None
    """A checkout of ThunderKittens, whose kernel is then built and timed (numerator alone)."""


def main() -> None:
    options, limits = tyro.cli(Options), rates()
    Console().print(f"copy {limits.copy / 1e12:.2f} TB/s, {limits.product / 1e12:.0f} TFLOP/s")
    found = {"copy_tb_s": limits.copy / 1e12, "product_tflop_s": limits.product / 1e12}
    ops = {**OPS, "taylor_linear_attention": partial(taylor, checkout=options.thunderkittens)}
    for op in options.ops:
        for key, measure in ops[op](limits):
            values = None if has_row("kernels", key) else measure()
            if values is not None:
                add_row("kernels", key, {**values, **found})
            torch.cuda.empty_cache()
    rows = device_rows("kernels", device_name())
    show([row for row in rows if row["op"] in options.ops])
    if "taylor_linear_attention" in options.ops:
        plot(rows)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("op", "batch, heads, tokens, dim", "direction", "implementation", "ms", "floor")
    for row in rows:
        sizes = ", ".join(str(row[name]) for name in Case._fields)
        op = " ".join(str(row[name]) for name in ("op", "window") if name in row)
        numbers = (f"{row['ms']:.3f}", f"{row['floor_ms']:.3f}")
        table.add_row(op, sizes, row["direction"], row["implementation"], *numbers)
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
