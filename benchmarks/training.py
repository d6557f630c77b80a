"""Training on one GPU: tokens a second of Based and its peers at 2k, 8k and 32k tokens.

`python -m benchmarks.training`. Synthetic tokens, bfloat16 over float32 weights,
compiled, an AdamW step every 65,536 tokens: our models, the Transformer++ of the same
size in the same trainer with whichever attention is faster (FlashAttention-2 or cuDNN,
timed first), and Mamba; with bfloat16 weights, as they come, mamba-ssm's Mamba instead of
ours where it is installed, and Hugging Face's Llama, compiled whole. A (model, length) is
measured once: the command can be stopped, and goes on where it was; without its row in
training.jsonl it is measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from based.models import PRESETS, DecoderConfig, preset
from based.models.accounting import skeleton, training_flops
from based.models.device import pick_device
from based.ops.linear_cross_entropy import linear_cross_entropy
from based.training.config import TrainConfig
from based.training.hardware import peak_flops
from based.training.learner import Learner
from based.training.parallel import Ranks
from based.training.plan import make_plan
from benchmarks import pieces, speeds
from benchmarks.attention import best_attention
from benchmarks.mamba import official_mamba
from benchmarks.pieces import Row
from benchmarks.rows import RESULTS
from benchmarks.speeds import Step

NAME = "training"
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


class Case(NamedTuple):
    """One way to compute a step."""

    model: str
    length: int
    sequences: int
    """Computed at a time."""
    recompute: bool

    def batch(self, options: Options) -> int:
        """Sequences of a step."""
        return max(self.sequences, options.step_tokens // self.length)


def main(options: Options) -> None:
    """Measures what is missing, a model a process, then shows all of this device."""
    console = Console()
    for model in options.models:
        if TWINS.get(model, model) not in PRESETS:
            console.print(f"{model}: not registered here, left out")
    known = [model for model in options.models if TWINS.get(model, model) in PRESETS]
    models = [model for model in known if missing(options, model)]
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
    return speeds.missing(options.out, NAME, model, options.lengths)


def measure(options: Options, model: str) -> None:
    """One row a length, written as soon as it is known."""
    device, shape, began = pick_device(options.device), shape_of(model), time.monotonic()
    for length in missing(options, model):
        if time.monotonic() - began > options.seconds:
            return
        with best_attention(shape, length, device, backward=True) as backend:
            row = first_that_fits(options, model, length, device)
        flops = training_flops(skeleton(shape), length)
        peak = peak_flops(device)
        speed = row["tokens_per_second"]
        row |= {"attention": backend, "token_flops": flops}
        row["peak_share"] = None if peak is None else speed * flops / peak
        pieces.write(options.out, NAME, {"model": model, "length": length, **row})
        Console().print(f"{model} at {length:,}: {speed:,.0f} tokens/s")


def first_that_fits(options: Options, model: str, length: int, device: torch.device) -> Row:
    """Times the first of the plans that memory suffices for, by estimate and in truth."""
    for tokens, recompute in PLANS:
        sequences = max(1, min(tokens, options.step_tokens) // length)
        case = Case(model, length, sequences, recompute)
        if needed(options, case, device) > memory_of(device):
            continue
        try:
            return timed(options, case, device)
        except torch.OutOfMemoryError:
            Console().print(f"{model} at {length:,}: {sequences} sequences do not fit")
    raise torch.OutOfMemoryError(f"{model} at {length} fits in no way that was tried")


def needed(options: Options, case: Case, device: torch.device) -> float:
    """Bytes that a step should take."""
    plan = make_plan(config_of(options, case), 1, device)
    # Hugging Face's Llama has all logits at once, and their gradient, in both precisions.
    tokens = case.sequences * case.length if case.model in TWINS else 0
    logits = 12 * tokens * shape_of(case.model).vocab_size
    return plan.memory_bytes + logits


def memory_of(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory


def timed(options: Options, case: Case, device: torch.device) -> Row:
    """Median step of several; its time by kind on a GPU."""
    torch.compiler.reset()
    speeds.release(device)
    peer = official_mamba(shape_of(case.model), device, torch.bfloat16)
    if peer is not None:
        build = partial(mamba_step, options, case, device, peer)
    else:
        build = partial(llama_step if case.model in TWINS else our_step, options, case, device)
    tokens = case.batch(options) * case.length
    return {
        **speeds.timed(build, tokens, options.steps, device),
        "micro_batch": case.sequences,
        "recompute": case.recompute,
        "compiled": options.compile and peer is None,
        "kernels": "based" if peer is None else "mamba-ssm",
        "step_tokens": tokens,
    }


def our_step(options: Options, case: Case, device: torch.device) -> Step:
    """A step of the trainer's own learner."""
    config, shape = config_of(options, case), shape_of(case.model)
    learner = Learner(shape, config, Ranks(device))
    rows = torch.randint(shape.vocab_size, (config.batch_size, case.length + 1))

    def step() -> None:
        learner.gradients(rows)
        learner.update(config.learning_rate)

    return step


def config_of(options: Options, case: Case) -> TrainConfig:
    return TrainConfig(
        data=Path("synthetic"),
        preset=TWINS.get(case.model, case.model),
        batch_size=case.batch(options),
        micro_batch=case.sequences,
        length=case.length,
        learning_rate=1e-4,
        recompute=case.recompute,
        compile=options.compile,
    )


def llama_step(options: Options, case: Case, device: torch.device) -> Step:
    """Hugging Face's Llama as its users train it: bfloat16 weights, SDPA, fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_of(case.model)
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
    if case.recompute:
        older = net.gradient_checkpointing_enable
        getattr(net, "activation_checkpointing_enable", older)()
    if options.compile:
        net.compile()
    rows = torch.randint(shape.vocab_size, (case.batch(options), case.length), device=device)
    return plain_step(net, lambda part: net(input_ids=part, labels=part).loss, rows, case)


def mamba_step(options: Options, case: Case, device: torch.device, net: Any) -> Step:
    """mamba-ssm's model with the same weights and optimiser, and our head's loss."""
    size = case.batch(options), case.length + 1
    rows = torch.randint(shape_of(case.model).vocab_size, size, device=device)

    def mean_loss(part: Tensor) -> Tensor:
        hidden = net.backbone(part[:, :-1]).flatten(0, 1)
        total, _ = linear_cross_entropy(hidden, net.lm_head.weight, part[:, 1:].flatten())
        return total / len(hidden)

    return plain_step(net, mean_loss, rows, case)


def plain_step(
    net: nn.Module, mean_loss: Callable[[Tensor], Tensor], rows: Tensor, case: Case
) -> Step:
    """A step in the weights' own dtype: micro-batches, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        for part in rows.split(case.sequences):
            (mean_loss(part) * len(part) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def shape_of(model: str) -> DecoderConfig:
    """The decoder of a preset, or the one that Hugging Face's Llama is held to."""
    shape = preset(TWINS.get(model, model))
    if model not in TWINS:
        return shape
    whole = {name: {**each, "rotary_fraction": 1.0} for name, each in shape.mixer_options.items()}
    return replace(shape, mixer_options=whole)


def show(console: Console, rows: list[Row]) -> None:
    """Speeds side by side, then where the time of each goes."""
    table = Table(
        "model", "length", "tokens/s", "of peak", "memory", "of its speed at the shortest"
    )
    first: dict[str, float] = {}
    rows = speeds.in_order(rows, MODELS)
    for row in rows:
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
    speeds.show_kinds(console, rows)


def plot(rows: list[Row], path: Path) -> None:
    """Tokens a second over the length of a sequence."""
    speeds.plot(rows, path, "tokens a sequence")


if __name__ == "__main__":
    main(tyro.cli(Options))
