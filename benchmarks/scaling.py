"""Training and generation on 1, 2, 4, 8 GPUs of one machine.

`python -m benchmarks.scaling` starts torchrun for each number of GPUs there are. Weak
scaling at 2k tokens a sequence (as much work a GPU, whatever their number); one
sequence of a million tokens split over all, whose loss must not depend on how many;
saving a checkpoint, and loading what another number of GPUs saved; generation by a
replica a GPU. What has a row in scaling.jsonl is not measured again.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table

from based.generation import Engine, EngineConfig, Sampling
from based.models import Decoder, preset
from based.training.checkpoint import Checkpoints
from based.training.config import TrainConfig
from based.training.hardware import peak_memory
from based.training.learner import Learner
from based.training.parallel import Ranks, job_ranks, join_job
from benchmarks import pieces
from benchmarks.pieces import Row
from benchmarks.rows import RESULTS

NAME = "scaling"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    gpus: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of GPUs; those that are not there are left out."""
    models: tuple[str, ...] = ("based-360m", "based-1.3b")
    """Presets."""
    length: int = 2048
    """Tokens a sequence, for weak scaling."""
    micro_batch: int = 16
    """Sequences a GPU computes at a time."""
    micro_batches: int = 4
    """Of a GPU a step."""
    steps: int = 5
    """Steps timed, after two that are not."""
    long_model: str = "based-360m"
    """What reads the long sequence, if it is among the models."""
    long_tokens: int = 1 << 20
    """Its length."""
    segment: int = 1 << 16
    """Tokens of it that a single GPU computes at a time."""
    sequences: int = 128
    """Sequences that a GPU generates together."""
    new_tokens: int = 128
    """Tokens it generates for each, while timed."""
    seconds: float = 480
    """Begin no further piece after this long."""
    compile: bool = True
    """Off for a quick look."""
    device: str = "auto"
    """cpu tries the benchmark on processes of this machine."""
    out: Path = RESULTS
    """Directory of scaling.jsonl."""
    scratch: Path = Path("runs/scaling")
    """Where checkpoints are written."""
    worker: bool = False
    """Set for the ranks that this command starts."""


def main(options: Options) -> None:
    """Starts the ranks, or is one of them."""
    if options.worker:
        work(options)
        return
    console, began = Console(), time.monotonic()
    there = torch.cuda.device_count() if options.device != "cpu" else max(options.gpus)
    for gpus in options.gpus:
        if gpus > there:
            console.print(f"{gpus} GPUs: there are {there}, left out")
        elif missing(options, gpus):
            left = options.seconds - (time.monotonic() - began)
            subprocess.run(command(options, gpus, left), check=False)
    rows = pieces.read(options.out, NAME)
    show(console, rows)
    plot(rows, options.out / f"{NAME}.png")


def command(options: Options, gpus: int, seconds: float) -> list[str]:
    """torchrun for that many ranks of this benchmark."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    flags = pieces.arguments(options, worker=True, seconds=seconds)
    return [sys.executable, "-m", *torchrun, "-m", "benchmarks.scaling", *flags]


def missing(options: Options, gpus: int) -> list[tuple[str, str]]:
    """(piece, model) that have no row for that many GPUs, what matters most first."""
    rows = pieces.read(options.out, NAME)
    done = {(row["piece"], row["model"], row["gpus"]) for row in rows}
    wanted = [(piece, model) for piece in PIECES for model in options.models]
    long = [("long sequence", options.long_model)] if options.long_model in options.models else []
    first = len(options.models)
    wanted = [*wanted[:first], *long, *wanted[first:]]
    return [(piece, model) for piece, model in wanted if (piece, model, gpus) not in done]


def work(options: Options) -> None:
    """One rank: measures what is missing; rank 0 writes it down."""
    device, began = join_job(options.device), time.monotonic()
    ranks = Ranks(device)
    for piece, model in ranks.from_first(missing(options, job_ranks())):
        if ranks.from_first(time.monotonic() - began > options.seconds):
            break
        measure = PIECES.get(piece, long_sequence)
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        row = measure(options, model, ranks)
        if ranks.rank == 0:
            common = {"piece": piece, "model": model, "gpus": ranks.size}
            row = {**common, **row, "memory_bytes": peak_memory(device)}
            pieces.write(options.out, NAME, row)
            Console().print(f"{ranks.size} x {model}, {piece}: {result(row)}")
    if dist.is_initialized():
        dist.destroy_process_group()


def weak_scaling(options: Options, model: str, ranks: Ranks) -> Row:
    """Tokens a second of all GPUs together."""
    sequences = options.micro_batch * options.micro_batches
    config = TrainConfig(
        data=Path("synthetic"),
        batch_size=sequences * ranks.size,
        micro_batch=options.micro_batch,
        length=options.length,
        compile=options.compile,
    )
    shape = preset(model)
    learner = Learner(shape, config, ranks)
    rows = torch.randint(shape.vocab_size, (sequences, options.length + 1))

    def step() -> None:
        learner.gradients(rows)
        learner.update(1e-4)

    seconds = timed(step, ranks, options.steps)
    tokens = config.batch_size * config.length
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "slowest": tokens / max(seconds),
        "fastest": tokens / min(seconds),
        "step_tokens": tokens,
        "micro_batch": options.micro_batch,
    }


def long_sequence(options: Options, model: str, ranks: Ranks) -> Row:
    """A step on one long sequence: split over the GPUs, or in segments on a single one."""
    config = TrainConfig(
        data=Path("synthetic"),
        batch_size=1,
        length=options.long_tokens,
        context_parallel=ranks.size,
        segment=options.segment if ranks.size == 1 else None,
        recompute=ranks.size > 1,
        compile=options.compile,
    )
    shape = preset(model)
    split = Ranks(ranks.device, ranks.size)
    learner = Learner(shape, config, split)
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(shape.vocab_size, (1, options.long_tokens + 1), generator=random)
    losses: list[float] = []

    def step() -> None:
        losses.extend(split.sum(learner.gradients(rows)[0]))
        learner.optimizer.zero_grad(set_to_none=True)

    seconds = timed(step, ranks, steps=1, warmup=1)
    return {"seconds": seconds[0], "tokens": options.long_tokens, "loss": losses[-1]}


def checkpointing(options: Options, model: str, ranks: Ranks) -> Row:
    """Seconds to save, how long training waits for it, and to load another number's save."""
    config = TrainConfig(data=Path("synthetic"))
    learner = Learner(preset(model), config, ranks)
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.update(0.0)
    checkpoints = Checkpoints(options.scratch / model, 1, ranks)
    others = ranks.from_first(max(checkpoints.steps(), default=0))
    row: Row = {"saved_by": others or None, "load_seconds": None}
    if others:
        state = learner.state()
        row["load_seconds"] = timed(lambda: checkpoints.load(others, state), ranks, 1, 0)[0]
        learner.load(state)
    # The step's number says how many GPUs saved it.
    waits = timed(lambda: checkpoints.save(ranks.size, learner.state()), ranks, 1, 0)
    began = time.perf_counter()
    checkpoints.wait()
    whole = waits[0] + time.perf_counter() - began
    return {**row, "save_seconds": ranks.from_first(whole), "training_waits_seconds": waits[0]}


def generation(options: Options, model: str, ranks: Ranks) -> Row:
    """New tokens a second of all replicas' engines, every slot decoding."""
    shape = preset(model)
    on_gpu = ranks.device.type == "cuda"
    with ranks.device:
        net = Decoder(shape).to(torch.bfloat16 if on_gpu else torch.float32)
    # One step shape: nothing else is needed, and each would be captured.
    engine = Engine(net, EngineConfig(options.sequences, deterministic=True, decode_per_prefill=0))
    rounds = options.new_tokens
    greedy = Sampling(temperature=0.0, max_new_tokens=4 * rounds + options.sequences)
    prompt = torch.randint(shape.vocab_size, (16,)).tolist()
    requests = [engine.submit(prompt, greedy) for _ in range(options.sequences)]
    while any(request.drawn == 0 for request in requests):
        engine.step()

    def generate() -> None:
        for _ in range(rounds):
            engine.step()

    seconds = timed(generate, ranks, steps=2, warmup=1)
    assert not any(request.finished for request in requests)
    tokens = options.sequences * rounds * ranks.size
    return {"tokens_per_second": tokens / statistics.median(seconds)}


PIECES: dict[str, Callable[[Options, str, Ranks], Row]] = {
    "weak scaling": weak_scaling,
    "checkpoint": checkpointing,
    "generation": generation,
}


def timed(step: Callable[[], object], ranks: Ranks, steps: int, warmup: int = 2) -> list[float]:
    """Seconds of each step, from when all ranks begin to when all have ended."""
    seconds = []
    for number in range(warmup + steps):
        if number == warmup and ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ranks.sum(0.0)
        began = time.perf_counter()
        step()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        ranks.sum(0.0)
        seconds.append(time.perf_counter() - began)
    return seconds[warmup:]


def efficiency(rows: list[Row], row: Row) -> float | None:
    """Speed against as many times a single GPU's; None where that was not measured."""
    same = (r for r in rows if (r["piece"], r["model"]) == (row["piece"], row["model"]))
    one = next((r for r in same if r["gpus"] == 1), None)
    if one is None or "tokens_per_second" not in row:
        return None
    return row["tokens_per_second"] / (row["gpus"] * one["tokens_per_second"])


def show(console: Console, rows: list[Row]) -> None:
    table = Table("piece", "model", "GPUs", "result", "of ideal", "memory a GPU")
    for row in sorted(rows, key=lambda r: (r["piece"], r["model"], r["gpus"])):
        share, memory = efficiency(rows, row), row["memory_bytes"]
        cells = (row["piece"], row["model"], str(row["gpus"]), result(row))
        ideal = "" if share is None else f"{share:.0%}"
        table.add_row(*cells, ideal, "" if memory is None else f"{memory / 1e9:.1f} GB")
    console.print(table)


def result(row: Row) -> str:
    """A row's figures in words."""
    if row["piece"] == "long sequence":
        return f"{row['tokens']:,} tokens in {row['seconds']:.1f} s, loss {row['loss']:.5f}"
    if row["piece"] == "checkpoint":
        text = f"saved in {row['save_seconds']:.1f} s"
        text += f" (training waits {row['training_waits_seconds']:.1f})"
        if row["load_seconds"] is None:
            return text
        return f"{text}; that of {row['saved_by']} loaded in {row['load_seconds']:.1f} s"
    return f"{row['tokens_per_second']:,.0f} tokens/s"


def plot(rows: list[Row], path: Path) -> None:
    """Speed over GPUs, with a single GPU's line as the ideal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, piece in zip(figure.subplots(1, 2), ("weak scaling", "generation"), strict=True):
        for color, model in enumerate(sorted({row["model"] for row in rows})):
            part = [row for row in rows if (row["piece"], row["model"]) == (piece, model)]
            part.sort(key=lambda row: row["gpus"])
            gpus = [row["gpus"] for row in part]
            speeds = [row["tokens_per_second"] for row in part]
            axes.plot(gpus, speeds, "o-", color=f"C{color}", label=model)
            if part and gpus[0] == 1:
                axes.plot(gpus, [n * speeds[0] for n in gpus], ":", color=f"C{color}")
        axes.set(xlabel="GPUs", ylabel="tokens a second", title=f"{piece}; dotted: ideal")
        axes.set_xticks(sorted({row["gpus"] for row in rows}))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options))
