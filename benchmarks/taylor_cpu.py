"""Taylor linear attention on the CPU: time a token and memory against length.

Forward, and forward+backward, of the chunked path beside the quadratic form (to 4k
tokens, where its memory becomes the point), in float32 at the shape of the
published 360M model's layer: 16 heads, feature_dim 16, head_dim 64, one sequence.
The floor is the flops of an ideal chunked pass at the machine's matrix-product speed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from based.ops.linear_attention.chunked import CHUNK
from based.ops.taylor_linear_attention import num_features, taylor_linear_attention
from benchmarks.rows import RESULTS, median_seconds, write_rows

HEADS, FEATURE_DIM, HEAD_DIM, THREADS = 16, 16, 64, 2
LENGTHS = (1024, 4096, 16384, 65536)
QUADRATIC = (1024, 4096)
ROUNDS = 5


def inputs(length: int) -> list[Tensor]:
    sizes = (FEATURE_DIM, FEATURE_DIM, HEAD_DIM)
    return [torch.randn(1, length, HEADS, size, requires_grad=True) for size in sizes]


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return taylor_linear_attention(q, k, v)[0]


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same function with all pairs of tokens at once, and no state."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s = q @ k.transpose(-1, -2) * FEATURE_DIM**-0.5
    a = torch.tril(1 + s + s.square() / 2)
    return (a @ v / a.sum(-1, keepdim=True)).transpose(1, 2)


def work(form: str, direction: str, length: int) -> Callable[[], object]:
    """The call that is timed."""
    function = {"chunked": chunked, "quadratic": quadratic}
    tensors = inputs(length)
    weight = torch.randn(1, length, HEADS, HEAD_DIM)

    def forward() -> None:
        with torch.no_grad():
            function[form](*tensors)

    def both() -> None:
        torch.autograd.grad((function[form](*tensors) * weight).sum(), tensors)

    return forward if direction == "forward" else both


def floor_flops(direction: str, length: int) -> float:
    """Products of an ideal chunked pass: causal chunk scores, values, state read and written."""
    features, values = num_features(FEATURE_DIM), HEAD_DIM + 1
    inside = CHUNK * (FEATURE_DIM + values)  # half of the square, two products
    state = 2 * 2 * features * values
    return HEADS * length * (inside + state) * (1 if direction == "forward" else 3)


def matmul_flops_per_second() -> float:
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / median_seconds(lambda: a @ a)


def peak_bytes(form: str, direction: str, length: int) -> int:
    """Peak resident memory that the call adds, read in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.taylor_cpu", "peak", form, direction, str(length)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(form: str, direction: str, length: int) -> None:
    torch.set_num_threads(THREADS)
    work(form, direction, 256)()
    call = work(form, direction, length)
    Path("/proc/self/clear_refs").write_text("5")  # restarts the peak from here
    before = peak_resident()
    call()
    print(peak_resident() - before)


def peak_resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def cases() -> list[tuple[str, str, int]]:
    forms = (("chunked", LENGTHS), ("quadratic", QUADRATIC))
    return [
        (form, direction, length)
        for direction in ("forward", "forward+backward")
        for form, lengths in forms
        for length in lengths
    ]


def main() -> None:
    torch.set_num_threads(THREADS)
    speed = matmul_flops_per_second()
    seconds: dict[tuple[str, str, int], list[float]] = {case: [] for case in cases()}
    # In rounds, so that a slow minute of the machine falls on every length alike.
    for _ in range(ROUNDS):
        for case, times in seconds.items():
            times.append(median_seconds(work(*case), repeats=3))
    rows = [
        {
            "form": form,
            "direction": direction,
            "length": length,
            "us_per_token": 1e6 * statistics.median(times) / length,
            "us_lowest": 1e6 * min(times) / length,
            "us_highest": 1e6 * max(times) / length,
            "floor_us_per_token": 1e6 * floor_flops(direction, length) / speed / length,
            "peak_bytes": peak_bytes(form, direction, length),
            "matmul_gflops": speed / 1e9,
        }
        for (form, direction, length), times in seconds.items()
    ]
    show(rows)
    plot(rows)
    Console().print(f"wrote {write_rows('taylor_cpu', rows)}")


def show(rows: list[dict]) -> None:
    table = Table("form", "direction", "tokens", "µs a token", "floor", "peak memory, B a token")
    for row in rows:
        table.add_row(
            row["form"],
            row["direction"],
            f"{row['length']:,}",
            f"{row['us_per_token']:.1f} ({row['us_lowest']:.1f} to {row['us_highest']:.1f})",
            f"{row['floor_us_per_token']:.1f}",
            f"{row['peak_bytes'] / row['length']:,.0f}",
        )
    Console().print(table)


def plot(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    styles = {"chunked": "o-", "quadratic": "s--"}
    for direction, color in (("forward", "C0"), ("forward+backward", "C3")):
        for form, style in styles.items():
            part = [r for r in rows if (r["form"], r["direction"]) == (form, direction)]
            lengths, label = [r["length"] for r in part], f"{form}, {direction}"
            time.loglog(lengths, [r["us_per_token"] for r in part], style, c=color, label=label)
            memory.loglog(lengths, [r["peak_bytes"] / 1e6 for r in part], style, c=color)
        floors = [r for r in rows if r["form"] == "chunked" and r["direction"] == direction]
        time.loglog(
            [r["length"] for r in floors], [r["floor_us_per_token"] for r in floors], ":", c=color
        )
    time.set(xlabel="tokens", ylabel="µs a token (dotted: floor)", title="time")
    memory.set(xlabel="tokens", ylabel="peak memory added, MB", title="memory")
    time.legend(frameon=False, fontsize=8)
    for axes in (time, memory):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(RESULTS / "taylor_cpu.png", dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print_peak(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
