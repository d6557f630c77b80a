"""Prefill on one GPU, end to end: prompt tokens a second of Based and its peers.

`python -m benchmarks.prefill`. Random weights and tokens in bfloat16, blocks compiled
(`Decoder.compile_blocks`), as many prompts at once as make 65,536 tokens; from the
prompt to the logits of its next token, and for Based to the state that decoding goes on
from; the others leave neither cache nor state, which favours them. Transformers have
whichever attention is faster (FlashAttention-2 or cuDNN, timed first); Mamba is
mamba-ssm's own model where that is installed, and ours elsewhere. The floor is the
matrix products at this GPU's own rate, then with them the inputs and outputs of every
linear layer, moved once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from based.generation import prefill
from based.models import Decoder, preset
from based.models.device import pick_device
from benchmarks import pieces, speeds
from benchmarks.attention import best_attention
from benchmarks.mamba import official_mamba
from benchmarks.pieces import Row
from benchmarks.rows import RESULTS
from benchmarks.speeds import Step
from benchmarks.timing import copy_rate, matmul_rate

NAME = "prefill"
MODELS = (
    *("based-360m", "based-1.3b", "attn-360m", "attn-1.3b-hd128"),
    *("mamba-360m", "mamba-1.3b"),
)
# What matters most first.
LENGTHS = {
    "based": (8192, 2048, 32768, 131072, 4096, 16384),
    "attn": (8192, 2048, 32768, 4096),
    "mamba": (4096, 16384),
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    models: tuple[str, ...] = MODELS
    """Presets."""
    lengths: tuple[int, ...] = ()
    """Tokens a prompt; each family's own unless given."""
    tokens: int = 65536
    """Tokens of all prompts read together, or one prompt if it is longer."""
    repeats: int = 5
    """Timed, after two that are not."""
    seconds: float = 480
    """Begin nothing further after this long."""
    compile: bool = True
    """Off for a quick look."""
    device: str = "auto"
    """cpu measures small presets, to try the benchmark."""
    out: Path = RESULTS
    """Directory of prefill.jsonl."""
    worker: bool = False
    """Measure in this process, one model after the other."""


def main(options: Options) -> None:
    """Measures what is missing, a model a process, then shows all of this device."""
    console = Console()
    models = [model for model in options.models if missing(options, model)]
    if options.worker:
        for model in models:
            measure(options, model)
        return
    pieces.each_in_a_process(NAME, options, models, console)
    rows = pieces.read(options.out, NAME)
    show(console, rows)
    if rows:
        plot(rows, options.out / f"{NAME}.png")


def missing(options: Options, model: str) -> list[int]:
    """Lengths at which this device has no row of the model yet."""
    lengths = options.lengths or LENGTHS[model.split("-")[0]]
    return speeds.missing(options.out, NAME, model, lengths)


@torch.no_grad()
def measure(options: Options, model: str) -> None:
    """One row a length, written as soon as it is known."""
    device, began, shape = pick_device(options.device), time.monotonic(), preset(model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        net = Decoder(shape).to(dtype).eval()
    peer = official_mamba(shape, device, dtype)
    if options.compile and peer is None:
        net.compile_blocks()
    for length in missing(options, model):
        if time.monotonic() - began > options.seconds:
            return
        batch = max(1, options.tokens // length)
        with best_attention(shape, length, device, backward=False) as backend:
            build = partial(reader, net, peer, batch, length)
            speeds.release(device)
            row = speeds.timed(build, batch * length, options.repeats, device)
        row |= {"attention": backend, **floor(net, batch * length, length, device)}
        row |= {"batch": batch, "kernels": "based" if peer is None else "mamba-ssm"}
        row["compiled"] = options.compile and peer is None
        pieces.write(options.out, NAME, {"model": model, "length": length, **row})
        speed = row["tokens_per_second"]
        Console().print(f"{model} at {batch} x {length:,}: {speed:,.0f} tokens/s")


def reader(net: Decoder, peer: Any, batch: int, length: int) -> Step:
    """What is timed, from the prompts to the logits of their next tokens."""
    tokens = torch.randint(net.config.vocab_size, (batch, length), device=net.device)
    if peer is not None:
        return lambda: peer(tokens, num_last_tokens=1).logits
    if "taylor_linear_attention" in net.config.mixers:
        return lambda: prefill(net, tokens, net.init_state(batch), chunk=length)
    return lambda: net.logits(net.hidden(tokens)[0][:, -1])


def floor(net: Decoder, tokens: int, length: int, device: torch.device) -> dict[str, float]:
    """Least milliseconds: of the products alone, and with what linear layers read and write."""
    matrices = sum(p.numel() for p in net.blocks.parameters() if p.dim() == 2)
    mixing = sum(mixer.mixing_flops(length) for mixer in net.mixers())
    products = tokens * (2 * matrices + mixing) / matmul_rate(device)
    layers = [module for module in net.blocks.modules() if isinstance(module, nn.Linear)]
    width = sum(layer.in_features + layer.out_features for layer in layers)
    moved = (tokens * width + matrices) * net.dtype.itemsize / copy_rate(device)
    return {"floor_ms": 1e3 * products, "floor_with_moves_ms": 1e3 * (products + moved)}


def show(console: Console, rows: list[Row]) -> None:
    """Speeds side by side, then where the time of each goes."""
    table = Table("model", "prompts", "tokens/s", "ms", "floor", "with moves", "memory")
    rows = speeds.in_order(rows, MODELS)
    for row in rows:
        memory = row["memory_bytes"]
        table.add_row(
            row["model"] + ("" if row["compiled"] else " (not compiled)"),
            f"{row['batch']} x {row['length']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['milliseconds']:.2f}",
            f"{row['floor_ms'] / row['milliseconds']:.0%}",
            f"{row['floor_with_moves_ms'] / row['milliseconds']:.0%}",
            "" if memory is None else f"{memory / 1e9:.0f} GB",
        )
    console.print(table)
    speeds.show_kinds(console, rows)


def plot(rows: list[Row], path: Path) -> None:
    """Tokens a second over the length of a prompt; dotted: the floor of Based's products."""
    speeds.plot(
        rows,
        path,
        "tokens a prompt",
        limit=lambda row: row["batch"] * row["length"] / row["floor_ms"] * 1e3,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
