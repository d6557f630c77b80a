"""README's tables, generated from benchmarks/results: `python -m benchmarks.tables`.

Text between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from based.models.command import human
from benchmarks.generation_plot import is_usual
from benchmarks.rows import read_rows

README = Path(__file__).parents[1] / "README.md"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decoding() -> str:
    rows = read_rows("decoding")
    body = [
        [
            row["model"],
            f"{row['context']:,}",
            human(row["state_bytes"]),
            f"{row['ms_per_token']:.2f}",
            f"{row['ms_lowest']:.2f} to {row['ms_highest']:.2f}",
        ]
        for row in rows
        if "context" in row
    ]
    headings = ["model", "context, tokens", "memory of a sequence", "ms a token", "three rounds"]
    prefill = next(row for row in rows if "prompt" in row)
    return markdown(headings, body) + (
        f"\n\nPrefill of {prefill['prompt']:,} tokens costs "
        f"{prefill['prefill_over_forward']:.2f} times the plain forward pass. "
        + measured_on(rows[0])
    )


def taylor_cpu() -> str:
    rows = read_rows("taylor_cpu")
    body = [
        [
            row["form"],
            row["direction"],
            f"{row['length']:,}",
            f"{row['us_per_token']:.1f}",
            f"{row['floor_us_per_token']:.1f}",
            human(row["peak_bytes"]),
        ]
        for row in rows
    ]
    headings = ["form", "direction", "tokens", "µs a token", "floor", "peak memory added"]
    return markdown(headings, body) + "\n\n" + measured_on(rows[0])


def kernels() -> str:
    names = ("based", "fla parallel", "fla fused_chunk", "ThunderKittens", "FlashAttention-2")
    names += ("cuDNN attention",)
    sizes = {name: name for name in ("batch", "tokens", "head_dim", "direction")}
    return side_by_side("taylor_linear_attention", sizes, names)


def windows() -> str:
    names = ("based", "FlexAttention", "windowed FlashAttention-2")
    sizes = {name: name for name in ("head_dim", "window", "direction")}
    return side_by_side("sliding_window_attention", sizes, names)


def convolutions() -> str:
    sizes = {"channels": "head_dim", "direction": "direction"}
    return side_by_side("gated_short_convolution", sizes, ("based", "torch.compile", "eager"))


def side_by_side(op: str, sizes: dict[str, str], names: tuple[str, ...]) -> str:
    """Milliseconds by `sizes`, headings and fields, of the rows' newest commit alone."""
    rows = [row for row in read_rows("kernels") if row["op"] == op]
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = tuple(row[field] for field in sizes.values())
        times.setdefault(key, {"floor": row["floor_ms"]})[row["implementation"]] = row["ms"]
    body = [
        [
            *(f"{size:,}" if isinstance(size, int) else size for size in key),
            *(f"{found[name]:.2f}" if name in found else "-" for name in (*names, "floor")),
        ]
        for key, found in times.items()
    ]
    return markdown([*sizes, *names, "floor"], body) + "\n\n" + measured_on(rows[0])


def prefill() -> str:
    rows = sorted(read_rows("prefill"), key=lambda row: (row["model"], row["length"]))
    body = [
        [
            row["model"],
            f"{row['batch']} x {row['length']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['floor_with_moves_ms'] / row['milliseconds']:.0%}",
        ]
        for row in rows
    ]
    headings = ["model", "prompts", "tokens/s", "of the floor"]
    return markdown(headings, body) + "\n\n" + measured_on(rows[0])


def generation() -> str:
    """Rounds of the engine as users have it: rows of other choices are in the file alone."""
    rows = [row for row in read_rows("generation") if row["piece"] == "decode" and is_usual(row)]
    rows.sort(key=lambda row: (row["model"], row["context"], row["batch"]))
    body = [
        [
            row["model"],
            f"{row['context']:,}",
            f"{row['batch']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ms_per_step']:.2f}",
            f"{row['floor_ms'] / row['ms_per_step']:.0%}",
            f"{row['peak_bytes'] / 1e9:.1f} GB",
        ]
        for row in rows
    ]
    headings = ["model", "context", "batch", "tokens/s", "ms a step", "of the floor", "memory"]
    commits = dict.fromkeys(row["commit"] for row in rows)
    found = {**rows[0], "commit": " and ".join(commits)}
    return markdown(headings, body) + "\n\n" + measured_on(found)


def measured_on(row: dict) -> str:
    return f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}."


TABLES: dict[str, Callable[[], str]] = {
    "decoding": decoding,
    "taylor_cpu": taylor_cpu,
    "kernels": kernels,
    "windows": windows,
    "convolutions": convolutions,
    "prefill": prefill,
    "generation": generation,
}


def fill(text: str) -> str:
    """The README's text with every table made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        made = table()
        text = re.sub(pattern, lambda m, t=made: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
