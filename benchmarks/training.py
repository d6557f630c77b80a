"""Training on one GPU: tokens a second of Based and its peers at 2k, 8k and 32k tokens.

`python -m benchmarks.training`. Synthetic tokens, bfloat16 over float32 weights,
compiled, an AdamW step every 65,536 tokens: our models, the Transformer++ of the same
size in the same trainer with whichever attention is faster (FlashAttention-2 or cuDNN,
timed first) and Mamba; and Hugging Face's Llama of that size, compiled whole, with
bfloat16 weights. A (model, length) is measured once: the command can be stopped, and
goes on where it was; without its row in training.jsonl it is measured again.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from based.models import PRESETS, DecoderConfig, preset
from based.models.accounting import skeleton, training_flops
from based.models.device import pick_device
from based.training.config import TrainConfig
from based.training.hardware import peak_flops, peak_memory
from based.training.learner import Learner
from based.training.parallel import Ranks
from benchmarks.profile import profiled
from benchmarks.rows import RESULTS, provenance

LLAMA = "hf-llama"
# In the order in which they are measured: what matters most first.
MODELS = (
    *("based-1.3b", "based-360m", "attn-1.3b-hd128", "attn-360m"),
    *(f"{LLAMA}-1.3b", f"{LLAMA}-360m", "mamba-1.3b", "mamba-360m"),
)
# The shape of Hugging Face's Llama.
TWINS = {f"{LLAMA}-1.3b": "attn-1.3b-hd128", f"{LLAMA}-360m": "attn-360m"}
# Tokens computed at a time, and whether activations are recomputed: the first that fits.
PLANS = ((32768, False), (16384, False), (8192, False), (32768, True), (8192, True))


@dataclass(frozen=True)
class Options:
    """What to measure."""

    models: tuple[str, ...] = MODELS
    """Presets; hf-llama-1.3b and hf-llama-360m are Hugging Face's."""
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens a sequence."""
    step_tokens: int = 65536
    """Tokens an optimiser step."""
    steps: int = 4
    """Steps timed, after two that are not."""
    seconds: float = 480
    """Begin no further model after this long."""
    compile: bool = True
    """Off for a quick look."""
    device: str = "auto"
    """cpu measures small presets, to try the benchmark."""
    out: Path = RESULTS
    """Directory of training.jsonl."""
    worker: bool = False
    """Measure in this process, one model after the other."""


Step = Callable[[], object]


def main(options: Options) -> None:
    """Measures what is missing, a model a process, then shows all of this device."""
    began, console = time.monotonic(), Console()
    for model in options.models:
        if not missing(options, model):
            continue
        if TWINS.get(model, model) not in PRESETS:
            console.print(f"{model}: not registered here, left out")
        elif options.worker:
            measure(options, model)
        elif time.monotonic() - began > options.seconds:
            console.print(f"{model}: not begun after {options.seconds:.0f} s; run again to go on")
        else:
            subprocess.run([*command(options), "--models", model], check=False)
    if not options.worker:
        show(console, read(options))


def command(options: Options) -> list[str]:
    """This benchmark for one model, `--models` still to come."""
    flags = ["--worker", "--device", options.device, "--out", str(options.out)]
    flags += ["--compile" if options.compile else "--no-compile"]
    flags += ["--lengths", *map(str, options.lengths), "--steps", str(options.steps)]
    flags += ["--step-tokens", str(options.step_tokens)]
    return [sys.executable, "-m", "benchmarks.training", *flags]


def missing(options: Options, model: str) -> list[int]:
    """Lengths at which this device has no row of the model yet."""
    done = {(row["model"], row["length"]) for row in read(options)}
    return [length for length in options.lengths if (model, length) not in done]


def measure(options: Options, model: str) -> None:
    """One row a length, written as soon as it is known."""
    device = pick_device(options.device)
    for length in missing(options, model):
        with best_attention(model, length, device) as backend:
            row = first_that_fits(options, model, length, device)
        flops = training_flops(skeleton(shape_of(model)), length)
        peak = peak_flops(device)
        speed = row["tokens_per_second"]
        row |= {"attention": backend, "token_flops": flops}
        row["peak_share"] = None if peak is None else speed * flops / peak
        write(options, {"model": model, "length": length, **row})
        Console().print(f"{model} at {length:,}: {speed:,.0f} tokens/s")


def first_that_fits(
    options: Options, model: str, length: int, device: torch.device
) -> dict[str, Any]:
    """Times the first of the plans that memory suffices for."""
    for tokens, recompute in PLANS:
        sequences = max(1, min(tokens, options.step_tokens) // length)
        with suppress(torch.OutOfMemoryError):
            return timed(options, model, length, sequences, recompute, device)
        gc.collect()
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(f"{model} at {length} fits in no way that was tried")


def timed(
    options: Options,
    model: str,
    length: int,
    sequences: int,
    recompute: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Median step of several; its time by kind on a GPU."""
    torch.compiler.reset()
    build = llama_step if model in TWINS else our_step
    batch = max(sequences, options.step_tokens // length)
    began = time.perf_counter()
    step = build(options, model, length, batch, sequences, recompute, device)
    for _ in range(2):
        step()
    synchronise(device)
    warmup = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(options.steps):
        began = time.perf_counter()
        step()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return {
        "tokens_per_second": batch * length / statistics.median(times),
        "slowest": batch * length / max(times),
        "fastest": batch * length / min(times),
        "micro_batch": sequences,
        "recompute": recompute,
        "compiled": options.compile,
        "step_tokens": batch * length,
        "warmup_seconds": warmup,
        "memory_bytes": peak_memory(device),
        "milliseconds": 1e3 * statistics.median(times),
        "by_kind": profiled(step) if device.type == "cuda" else None,
    }


def our_step(
    options: Options,
    model: str,
    length: int,
    batch: int,
    sequences: int,
    recompute: bool,
    device: torch.device,
) -> Step:
    """A step of the trainer's own learner."""
    config = TrainConfig(
        data=Path("synthetic"),
        preset=model,
        batch_size=batch,
        micro_batch=sequences,
        length=length,
        learning_rate=1e-4,
        recompute=recompute,
        compile=options.compile,
    )
    shape = shape_of(model)
    learner = Learner(shape, config, Ranks(device))
    rows = torch.randint(shape.vocab_size, (batch, length + 1))

    def step() -> None:
        learner.gradients(rows)
        learner.update(config.learning_rate)

    return step


def llama_step(
    options: Options,
    model: str,
    length: int,
    batch: int,
    sequences: int,
    recompute: bool,
    device: torch.device,
) -> Step:
    """Hugging Face's Llama as its users train it: bfloat16 weights, SDPA, fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_of(model)
    (attention,) = shape.mixer_options.values()
    config: Any = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=len(shape.mixers),
        num_attention_heads=attention["num_heads"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    build: Any = LlamaForCausalLM._from_config
    net = build(config, attn_implementation="sdpa").to(device=device, dtype=torch.bfloat16)
    if recompute:
        older = net.gradient_checkpointing_enable
        getattr(net, "activation_checkpointing_enable", older)()
    if options.compile:
        net.compile()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    rows = torch.randint(shape.vocab_size, (batch, length), device=device)

    def step() -> None:
        for part in rows.split(sequences):
            (net(input_ids=part, labels=part).loss * len(part) / batch).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def best_attention(
    model: str, length: int, device: torch.device
) -> AbstractContextManager[str | None]:
    """Chooses SDPA's faster kernel, forward and backward, for models of softmax attention."""
    shape = shape_of(model)
    softmax = {name: options for name, options in shape.mixer_options.items() if "softmax" in name}
    if device.type != "cuda" or not softmax:
        return nullcontext(None)
    (options,) = softmax.values()
    heads = options["num_heads"]
    size = (max(1, 16384 // length), heads, length, shape.hidden_size // heads)
    times = {
        backend: attention_seconds(backend, size)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    }
    return Chosen(min(times, key=lambda backend: times[backend]))


class Chosen(AbstractContextManager[str]):
    """SDPA with one kernel; enters as its name."""

    def __init__(self, backend: SDPBackend) -> None:
        self.backend, self._inner = backend, sdpa_kernel(backend)

    def __enter__(self) -> str:
        self._inner.__enter__()
        return self.backend.name.lower()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)


def attention_seconds(backend: SDPBackend, size: tuple[int, ...]) -> float:
    """Of a pass forward and back; infinite where the kernel does not take the shape."""
    q, k, v = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    times = []
    try:
        with sdpa_kernel(backend):
            for _ in range(8):
                torch.cuda.synchronize()
                began = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(q)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
    except RuntimeError:
        return float("inf")
    return statistics.median(times[3:])


def shape_of(model: str) -> DecoderConfig:
    """The decoder of a preset, or the one that Hugging Face's Llama is held to."""
    shape = preset(TWINS.get(model, model))
    if model not in TWINS:
        return shape
    whole = {name: {**each, "rotary_fraction": 1.0} for name, each in shape.mixer_options.items()}
    return replace(shape, mixer_options=whole)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def read(options: Options) -> list[dict[str, Any]]:
    """Rows of this device."""
    path, device = options.out / "training.jsonl", provenance()["device"]
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["device"] == device]


def write(options: Options, row: dict[str, Any]) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "training.jsonl").open("a") as file:
        file.write(json.dumps({**row, **provenance()}) + "\n")


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Speeds side by side, then where the time of each goes."""
    table = Table(
        "model", "length", "tokens/s", "of peak", "memory", "of its speed at the shortest"
    )
    first: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: [*MODELS, row["model"]].index(row["model"])):
        speed = row["tokens_per_second"]
        base = first.setdefault(row["model"], speed)
        share, memory = row["peak_share"], row["memory_bytes"]
        table.add_row(
            row["model"] + (" (recomputing)" if row["recompute"] else ""),
            f"{row['length']:,}",
            f"{speed:,.0f}",
            "" if share is None else f"{share:.1%}",
            "" if memory is None else f"{memory / 1e9:.0f} GB",
            f"{speed / base:.0%}",
        )
    console.print(table)
    for row in rows:
        if row["by_kind"]:
            total = row["milliseconds"]
            parts = {**row["by_kind"], "idle": max(total - sum(row["by_kind"].values()), 0.0)}
            text = ", ".join(f"{kind} {ms / total:.0%}" for kind, ms in parts.items())
            console.print(f"{row['model']} at {row['length']:,}: {text}")


if __name__ == "__main__":
    main(tyro.cli(Options))
