"""The tables of README and docs, generated from benchmarks/results: `python -m benchmarks.tables`.

Text between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from based.models.command import human
from benchmarks import recall_tables, speeds
from benchmarks import scaling as scaling_benchmark
from benchmarks import training as training_benchmark
from benchmarks.generation_plot import rounds, usual_rounds
from benchmarks.rows import device_rows, newest, of_device, read_rows

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = "training", "generation", "recall", "kernels"
PAGES = (README, *(ROOT / "docs" / f"{name}.md" for name in DOCS))
# Batches in the README's table of decoding; the file has more.
SHOWN_BATCHES = (1, 64, 128, 1024, 4096)
# Of the tables of its kernels: fields that are headings too.
TAYLOR = "taylor_linear_attention"
TAYLOR_SIZES = {name: name for name in ("batch", "tokens", "head_dim", "direction")}


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decoding() -> str:
    rows = device_rows("decoding")
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
    rows = device_rows("taylor_cpu")
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
    return measured(headings, body, rows[:1])


def kernels() -> str:
    names = ("based", "fla parallel", "fla fused_chunk", "ThunderKittens", "FlashAttention-2")
    names += ("cuDNN attention",)
    return side_by_side(TAYLOR, TAYLOR_SIZES, names)


def hopper() -> str:
    """Ours in both languages."""
    return side_by_side(TAYLOR, TAYLOR_SIZES, ("based in Triton", "based"), digits=3)


def windows() -> str:
    names = ("based", "FlexAttention", "windowed FlashAttention-2")
    sizes = {name: name for name in ("head_dim", "window", "direction")}
    return side_by_side("sliding_window_attention", sizes, names)


def convolutions() -> str:
    sizes = {"channels": "head_dim", "direction": "direction"}
    return side_by_side("gated_short_convolution", sizes, ("based", "torch.compile", "eager"))


def side_by_side(op: str, sizes: dict[str, str], names: tuple[str, ...], digits: int = 2) -> str:
    """Milliseconds by `sizes`, headings and fields, of the rows' newest commit alone."""
    rows = [row for row in device_rows("kernels") if row["op"] == op]
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = tuple(row[field] for field in sizes.values())
        times.setdefault(key, {"floor": row["floor_ms"]})[row["implementation"]] = row["ms"]
    body = [
        [
            *(f"{size:,}" if isinstance(size, int) else size for size in key),
            *(f"{found[x]:.{digits}f}" if x in found else "-" for x in (*names, "floor")),
        ]
        for key, found in times.items()
    ]
    return measured([*sizes, *names, "floor"], body, rows[:1])


def prefill() -> str:
    rows = sorted(device_rows("prefill"), key=lambda row: (row["model"], row["length"]))
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
    return measured(headings, body, rows)


def generation() -> str:
    """Rounds of the engine as users have it: rows of other choices are in the file alone."""
    return _rounds([row for row in usual_rounds() if row["batch"] in SHOWN_BATCHES])


def other_devices() -> str:
    """The same on devices other than the one measured last, a table each."""
    rows = rounds()
    devices = dict.fromkeys(row["device"] for row in rows if row["device"] != rows[-1]["device"])
    return "\n\n".join(_rounds(usual_rounds(device)) for device in devices)


def _rounds(rows: list[dict]) -> str:
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
    return measured(headings, body, rows)


def whole_requests() -> str:
    """Prompts read and answers generated, ours and others."""
    systems = {"generate": "our engine", "queue": "our engine"}
    systems |= {"huggingface": "transformers", "mamba": "mamba-ssm"}
    rows = of_device([row for row in read_rows("generation") if row["piece"] in systems])
    rows = newest(rows, "piece", "model", "batch", "tokens")
    body = [
        [
            row["model"],
            systems[row["piece"]],
            _requests(row),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds']:.1f}",
            f"{row['peak_bytes'] / 1e9:.1f} GB",
        ]
        for row in sorted(rows, key=lambda row: (row["batch"], -row["tokens_per_second"]))
    ]
    headings = ["model", "in", "prompt + new tokens", "new tokens/s", "seconds", "memory"]
    return measured(headings, body, rows)


def _requests(row: dict[str, Any]) -> str:
    """How many, of how many tokens; those of a queue get different numbers."""
    count, tokens = row.get("requests", row["batch"]), row["tokens"]
    new = tokens if isinstance(tokens, str) else f"{tokens:,}"
    return f"{count:,} x {row['prompt']} + {new}"


def first_token() -> str:
    """Milliseconds until prompts that come together have their first tokens."""
    rows = of_device([row for row in read_rows("generation") if row["piece"] == "first"])
    rows = newest(rows, "model", "batch", "context")
    cells = {(row["model"], row["batch"], row["context"]): row["ms"] for row in rows}
    prompts = sorted({(batch, context) for _, batch, context in cells})
    body = [
        [model, *(f"{cells[model, *p]:,.1f}" if (model, *p) in cells else "-" for p in prompts)]
        for model in sorted({model for model, _, _ in cells})
    ]
    return measured(["model", *(f"{n:,} x {tokens:,}" for n, tokens in prompts)], body, rows)


def decode_profile() -> str:
    """GPU time of a step by kind of kernel."""
    rows = of_device([row for row in read_rows("generation") if row["piece"] == "profile"])
    rows = newest(rows, "model", "batch")
    rows.sort(key=lambda row: (row["model"], row["batch"]))
    floors = {(row["model"], row["batch"]): row["floor_ms"] for row in usual_rounds()}
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["ms"]))
    body = [
        [
            f"{row['model']}, {row['batch']:,}",
            f"{row['ms_per_step']:.2f}",
            f"{floors[row['model'], row['batch']]:.2f}",
            *(f"{row['ms'][kind]:.2f}" if kind in row["ms"] else "-" for kind in kinds),
        ]
        for row in rows
    ]
    return measured(["model, batch", "step", "floor", *kinds], body, rows)


def quantization() -> str:
    rows = device_rows("quantization")
    body = [
        [
            row["weights"],
            *(f"{row[f'perplexity_{group}']:.3f}" for group in ("all", "hits", "rest")),
            f"{row['difference']:+.5f} ± {row['error']:.5f}",
        ]
        for row in rows
    ]
    headings = ["weights", "perplexity", "recall hits", "the rest", "more nats a token"]
    return measured(headings, body, rows)


def _training_rows() -> list[dict]:
    rows = newest(device_rows("training"), "model", "length")
    return speeds.in_order(rows, training_benchmark.MODELS)


def training() -> str:
    rows = _training_rows()
    body = [
        [
            row["model"],
            f"{row['length']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_share']:.0%}",
            f"{row['memory_bytes'] / 1e9:.0f} GB" + (", recomputing" if row["recompute"] else ""),
        ]
        for row in rows
    ]
    headings = ["model", "tokens a sequence", "tokens/s", "of peak", "memory"]
    return measured(headings, body, rows)


def training_profile() -> str:
    """Shares of a step by kind of kernel."""
    rows = _training_rows()
    # Of what no row spends half a percent on, nothing is said.
    kinds = list(
        dict.fromkeys(
            kind
            for row in rows
            for kind, time in row["by_kind"].items()
            if time > 0.005 * row["milliseconds"]
        )
    )
    body = [
        [
            row["model"],
            f"{row['length']:,}",
            *(f"{row['by_kind'].get(kind, 0) / row['milliseconds']:.0%}" for kind in kinds),
        ]
        for row in rows
    ]
    return measured(["model", "tokens", *kinds], body, rows)


def scaling() -> str:
    rows = newest(device_rows("scaling"), "piece", "model", "gpus")
    rows.sort(key=lambda row: (row["piece"], row["model"], row["gpus"]))
    body = [
        [
            row["piece"],
            row["model"],
            str(row["gpus"]),
            scaling_benchmark.result(row),
            f"{share:.0%}" if (share := scaling_benchmark.efficiency(rows, row)) else "-",
            f"{row['memory_bytes'] / 1e9:.1f} GB",
        ]
        for row in rows
    ]
    headings = ["piece", "model", "GPUs", "result", "of ideal", "memory a GPU"]
    return measured(headings, body, rows)


def recall_speed() -> str:
    """Seconds a configuration, ours beside the official trainer's."""
    rows = device_rows("recall")
    theirs = {row["point"]: row for row in rows if row["what"] == "zoology"}
    ours = [row for row in rows if row["what"] == "ours" and row["point"] in theirs]
    body = []
    for row in ours:
        their = theirs[row["point"]]
        whole = [found["seconds_a_configuration"] for found in (row, their)]
        body.append(
            [
                row["point"].rsplit("-", 1)[0],
                str(row["jobs"]),
                f"{row['epoch_seconds'] / row['lanes']:.2f}",
                f"{their['epoch_seconds']:.2f}",
                *(f"{seconds:.0f}" for seconds in whole),
                f"{whole[1] / whole[0]:.1f}",
            ]
        )
    headings = ["point", "side by side", "an epoch, ours, s", "Zoology's", "32 epochs, ours"]
    return measured([*headings, "Zoology's", "times"], body, [*ours, *theirs.values()])


def recall(lines: list[list[str]], *sweeps: str) -> str:
    """A table of the recall lab's, and where its sweeps' calls ran."""
    calls = [row for row in read_rows("sweeps") if row["sweep"] in sweeps]
    return measured(lines[0], lines[1:], calls) if calls else markdown(lines[0], lines[1:])


def measured(headings: list[str], body: list[list[str]], rows: list[dict]) -> str:
    """A table, and what its rows were measured on."""
    return markdown(headings, body) + "\n\n" + measured_on(*rows)


def measured_on(*rows: dict) -> str:
    """Devices, versions, commits and days of the rows."""
    device, torch, commit, date = (
        " and ".join(dict.fromkeys(row[name] for row in rows))
        for name in ("device", "torch", "commit", "date")
    )
    return f"{device}, torch {torch}, commit {commit}, {date}."


TABLES: dict[str, Callable[[], str]] = {
    "decoding": decoding,
    "taylor_cpu": taylor_cpu,
    "kernels": kernels,
    "hopper": hopper,
    "windows": windows,
    "convolutions": convolutions,
    "prefill": prefill,
    "generation": generation,
    "other_devices": other_devices,
    "whole_requests": whole_requests,
    "first_token": first_token,
    "decode_profile": decode_profile,
    "quantization": quantization,
    "training": training,
    "training_profile": training_profile,
    "scaling": scaling,
    "recall_speed": recall_speed,
    "recall_arithmetic": lambda: recall(recall_tables.arithmetic(), "exact", "core"),
    "recall_combination": lambda: recall(recall_tables.combination(), "combination"),
    "recall_feature_maps": lambda: recall(recall_tables.feature_maps(), "feature-maps"),
}


def fill(text: str) -> str:
    """A page's text with every table of it made anew."""
    for name, table in TABLES.items():
        if f"<!-- table {name} -->" not in text:
            continue
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        made = table()
        text = re.sub(pattern, lambda m, t=made: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
