"""Generation on a GPU: tokens a second of ours and of peers, in pieces of some minutes.

    python -m benchmarks.generation decode --models based-1.3b attn-1.3b-hd128 --batches 1 128
    python -m benchmarks.generation plot

Each measurement is a row of results/generation.jsonl as soon as it is made; a row that
this device has at this commit is not measured again. `decode` times rounds of the
engine, host and all, with every slot at a given context; warm-up is apart.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from based.generation import Engine, EngineConfig, Generation, Sampling
from based.generation.quantization import Precision
from based.models import Decoder, DecoderState, preset
from based.models.device import pick_device
from based.ops import kernels
from based.ops.few_rows_linear import projections, residual
from benchmarks import floors, peers
from benchmarks.generation_plot import draw
from benchmarks.profile import profiled
from benchmarks.rows import add_row, has_row

NAME = "generation"
WARMUP, TIMED, PREFILL_ROWS = 8, 15, 128
# Tokens of a queued request: from the first on, less than the second.
QUEUED = 64, 257
Piece = Literal[
    "decode",
    "prompt",
    "profile",
    "generate",
    "queue",
    "first",
    "kernels",
    "state",
    "huggingface",
    "mamba",
    "official",
    "plot",
]


@dataclass(frozen=True)
class Options:
    """One piece of the benchmark."""

    piece: Annotated[Piece, tyro.conf.Positional]
    """decode: rounds at a context. prompt: the same after a real prompt of that length. profile:
    a round's GPU time by kind of kernel. generate: whole requests, as the paper counts. queue: four
    times as many as there are slots, of 64 to 256 tokens each, so that prompts are read between.
    first: until all of a batch of prompts, of a context's tokens each, have their first token.
    kernels: bytes a second of each decode kernel. state: the error of a state over many tokens.
    The others are peers; plot draws the rows."""
    models: tuple[str, ...] = ("based-1.3b",)
    batches: tuple[int, ...] = (1, 128)
    contexts: tuple[int, ...] = (1024,)
    window: int | None = None
    """Of a based preset: keys a query sees."""
    recent: int = EngineConfig.recent
    """Tokens between writes of the linear state; 0 writes every token."""
    deterministic: bool = False
    quantize: Precision | None = None
    overlap: bool = True
    """Whether kernels start while the one before ends (programmatic dependent launch)."""
    fused: bool = True
    """Whether steps of up to 128 rows take the fused projections."""
    tokens: int = 64
    """Timed steps, or tokens that each request generates."""
    prompt: int = 128
    """Tokens of each prompt of `generate` and of peers."""
    attention: str = "sdpa"
    """Of Hugging Face's model: sdpa or flash_attention_2."""
    repository: Path | None = None
    """A checkout of the official repository, for `official`."""
    device: str = "auto"


def main() -> None:
    options = tyro.cli(Options)
    if options.piece == "plot":
        Console().print(f"wrote {draw()}")
        return
    device = pick_device(options.device)
    kernels.OVERLAP = options.overlap
    projections.MOST_ROWS *= options.fused
    residual.MOST_ROWS_IN_TILES *= options.fused
    for key, measure in cells(options, device):
        key = {"piece": options.piece, **key}
        if has_row(NAME, key):
            continue
        try:
            values = measure()
        except torch.OutOfMemoryError as error:
            values = {"failed": str(error).splitlines()[0]}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        add_row(NAME, key, values)
        Console().print({**key, **values})


Cells = Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]


def cells(options: Options, device: torch.device) -> Cells:
    """What the piece measures: the key of each row, and how it is made."""
    grid = product(options.models, options.contexts, options.batches)
    if options.piece == "kernels":
        yield from floors.kernel_cells(options.batches, device)
    elif options.piece == "state":
        yield from floors.state_cells(options.contexts, device)
    elif options.piece in ("decode", "prompt", "profile", "first"):
        make = {"profile": _profile, "first": _first}.get(options.piece, _decode)
        for model, context, batch in grid:
            key = {"system": "based", "model": model, "batch": batch, "context": context}
            yield {**key, **_dials(options)}, make(options, device, model, batch, context)
    elif options.piece in ("generate", "queue"):
        queued = options.piece == "queue"
        tokens = f"{QUEUED[0]} to {QUEUED[1] - 1}" if queued else options.tokens
        for model, batch in product(options.models, options.batches):
            key = {"system": "based", "model": model, "batch": batch}
            key |= {"prompt": options.prompt, "tokens": tokens, **_dials(options)}
            yield key, partial(_queue if queued else _generate, options, device, model, batch)
    else:
        for batch in options.batches:
            key = {"system": options.piece, "batch": batch}
            key |= {"prompt": options.prompt, "tokens": options.tokens}
            yield from _peer(options, key, batch)


def _dials(options: Options) -> dict[str, Any]:
    names = ("window", "recent", "deterministic", "quantize", "overlap", "fused")
    return {name: value for name, value in asdict(options).items() if name in names}


def _peer(options: Options, key: dict[str, Any], batch: int) -> Cells:
    sizes = (batch, options.prompt, options.tokens)
    if options.piece == "huggingface":
        for model in options.models:
            yield (
                {**key, "model": model, "attention": options.attention},
                partial(peers.huggingface, preset(model), *sizes, options.attention),
            )
    elif options.piece == "mamba":
        yield {**key, "model": "mamba-1.3b"}, partial(peers.mamba, *sizes)
    else:
        repository = options.repository or Path("based")
        yield {**key, "model": "based-1.3b"}, partial(peers.official, repository, *sizes)


def build(name: str, device: torch.device, window: int | None = None) -> Decoder:
    """The preset with random weights: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(preset(name, window=window))
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def _engine(options: Options, model: Decoder, batch: int, length: int) -> Engine:
    config = replace(
        _config(options, batch, length),
        # The slots fill as fast as they can, and all of them stay full: what is timed comes after.
        decode_per_prefill=0,
        prefill_rows=PREFILL_ROWS,
        step_sizes=(batch,),
    )
    return Engine(model, config)


def _config(options: Options, slots: int, length: int) -> EngineConfig:
    return EngineConfig(
        slots=slots,
        max_length=length,
        recent=options.recent,
        deterministic=options.deterministic,
        quantize=options.quantize,
    )


def _filled(
    options: Options, device: torch.device, name: str, batch: int, context: int
) -> tuple[Engine, list[Generation]]:
    """An engine all of whose slots decode, at a context: a real one if the piece is `prompt`."""
    model, real = build(name, device, options.window), options.piece == "prompt"
    prompt = torch.randint(model.config.vocab_size, (context if real else 1,)).tolist()
    margin = batch + 2 * WARMUP + options.tokens + options.recent
    engine = _engine(options, model, batch, context + margin + 1)
    greedy = Sampling(temperature=0.0, max_new_tokens=margin)
    requests = [engine.submit(prompt, greedy) for _ in range(batch)]
    while any(request.drawn == 0 for request in requests):
        engine.step()
    if not real:
        place_at(engine.pool.state, context)
    return engine, requests


def _decode(
    options: Options, device: torch.device, name: str, batch: int, context: int
) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        began = time.perf_counter()
        engine, requests = _filled(options, device, name, batch, context)
        ready = time.perf_counter() - began
        peak_bytes(device)
        seconds = time_rounds(engine, options.tokens, device)
        assert not any(request.finished for request in requests)
        return {
            "tokens_per_second": batch / seconds,
            "ms_per_step": 1000 * seconds,
            "start_seconds": ready,
            "state_bytes": engine.pool.state.narrow(0, batch).nbytes,
            "peak_bytes": peak_bytes(device),
            **floors.decode_floor(engine.model, batch, context, engine, device),
        }

    return measure


def _profile(
    options: Options, device: torch.device, name: str, batch: int, context: int
) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        engine, _ = _filled(options, device, name, batch, context)
        seconds = time_rounds(engine, WARMUP, device)
        # Every row folds once in so many steps.
        return {"ms_per_step": 1000 * seconds, "ms": profiled(engine.step, max(1, options.recent))}

    return measure


def place_at(state: DecoderState, context: int) -> None:
    """As if every row had seen `context` tokens; what they were does not change the speed."""
    for layer in state:
        if "length" in layer:
            layer["length"].fill_(context)
            layer["keys"].normal_()
            layer["values"].normal_()


def time_rounds(engine: Engine, rounds: int, device: torch.device) -> float:
    """Seconds a round, after a warm-up; the host's work is part of it."""
    for _ in range(WARMUP):
        engine.step()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(rounds):
        engine.step()
    synchronize(device)
    return (time.perf_counter() - began) / rounds


def _generate(options: Options, device: torch.device, name: str, batch: int) -> dict[str, Any]:
    model = build(name, device, options.window)
    engine = _engine(options, model, batch, options.prompt + options.tokens)
    shape = (batch, options.prompt)
    prompts = torch.randint(model.config.vocab_size, shape).tolist()
    run = partial(_seconds, engine, prompts)
    run(2)
    peak_bytes(device)
    prefill, seconds = run(1), run(options.tokens)
    return {
        "tokens_per_second": batch * options.tokens / seconds,
        "seconds": seconds,
        "prefill_seconds": prefill,
        "peak_bytes": peak_bytes(device),
    }


def _seconds(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Until requests with these prompts, submitted together, have so many tokens each."""
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
    began = time.perf_counter()
    requests = [engine.submit(prompt, sampling) for prompt in prompts]
    while engine.busy:
        engine.step()
    assert all(len(request.tokens) == tokens for request in requests)
    return time.perf_counter() - began


def _queue(options: Options, device: torch.device, name: str, batch: int) -> dict[str, Any]:
    model = build(name, device, options.window)
    length, count = options.prompt + max(QUEUED), 4 * batch
    engine = Engine(model, _config(options, batch, length))
    prompts = torch.randint(model.config.vocab_size, (count, options.prompt)).tolist()
    tokens = torch.randint(*QUEUED, (count,)).tolist()

    def run() -> tuple[float, float]:
        began, longest = time.perf_counter(), 0.0
        for prompt, most in zip(prompts, tokens, strict=True):
            engine.submit(prompt, Sampling(temperature=0.0, max_new_tokens=most))
        while engine.busy:
            round_began = time.perf_counter()
            engine.step()
            longest = max(longest, time.perf_counter() - round_began)
        return time.perf_counter() - began, longest

    # Prompts come together in other numbers each time, and some are captured at their first.
    for _ in range(4):
        run()
    seconds, longest = run()
    return {
        "requests": count,
        "tokens_per_second": sum(tokens) / seconds,
        "seconds": seconds,
        "longest_round_ms": 1000 * longest,
        "peak_bytes": peak_bytes(device),
    }


def _first(
    options: Options, device: torch.device, name: str, batch: int, context: int
) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        model = build(name, device, options.window)
        slots = max(batch, 8)
        engine = Engine(model, replace(_config(options, slots, context + 1), step_sizes=(slots,)))
        shape = (WARMUP + TIMED, batch, context)
        prompts = torch.randint(model.config.vocab_size, shape).tolist()
        seconds = [_seconds(engine, together, 1) for together in prompts][WARMUP:]
        return {
            "ms": 1000 * median(seconds),
            "slowest_ms": 1000 * max(seconds),
            "tokens_per_second": batch * context / median(seconds),
            "peak_bytes": peak_bytes(device),
        }

    return measure


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: torch.device) -> int:
    """Most GPU memory allocated since the last call; on a CPU, most memory the process had."""
    if device.type != "cuda":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


if __name__ == "__main__":
    main()
