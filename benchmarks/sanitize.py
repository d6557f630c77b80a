"""NVIDIA's compute-sanitizer over every kernel, at small odd shapes.

    python -m benchmarks.sanitize                              # all; rows in results/sanitize.jsonl
    python -m benchmarks.sanitize hopper --tools racecheck     # a part, one of its tools
    python -m benchmarks.sanitize hopper --here                # a part, watched by nothing

Parts are `hopper` (Taylor linear attention in CUDA C++), `taylor-K` (in Triton, with that
feature_dim), `mixers`, `decoding`, and `products` (decode steps, projections in CUDA C++).
Every tensor is an allocation of its own, so that a step past its end is seen. Tests compare
numbers; here only NaNs end the run.

Triton has each thread that holds a sum write it to shared memory, where copies differ in
their last bit: racecheck reports these (triton-lang/triton issue 7264). Writes of one
instruction are counted beside errors, as `same_store`. What memcheck and synccheck add to a
kernel wants stack and registers of its own: kernels that spill have more stack here, and
none is held to a number of registers. A part that even so does not come to its end is watched
again as assembled without optimising; its row says so, and how the first run ended
(docs/kernels.md tells what was seen).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# Before torch starts: no cache between tensors and the driver.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from typing import Annotated
from unittest import mock

import torch
import tyro
from rich.console import Console
from torch import Tensor

from based.errors import BasedError
from based.generation.sampling import Sampling, sampling_rows
from based.generation.step import DecodeStep
from based.mixers import build_mixer
from based.models import Decoder, DecoderConfig
from based.ops import kernels
from based.ops.stacked_cross_entropy import stacked_cross_entropy
from based.ops.taylor_linear_attention import decode as taylor_decode
from based.ops.taylor_linear_attention import num_features
from based.ops.taylor_linear_attention.kernels import launch
from based.ops.taylor_linear_attention.operator import _unsupported
from benchmarks.rows import add_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, HEADS = 333, 3
# Assembled without optimising; with line numbers ptxas itself crashes on some kernels.
PLAINLY = {"DISABLE_PTXAS_OPT": "1", "TRITON_DISABLE_LINE_INFO": "1"}
# CU_LIMIT_STACK_SIZE, and bytes: by default the calls that a tool adds can leave the stack.
STACK = 0, 16384
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
PARTS = (
    *("hopper", "taylor-8", "taylor-16", "taylor-24", "taylor-32"),
    *("mixers", "decoding", "products"),
)


@dataclass(frozen=True)
class Options:
    """What is watched, and by what."""

    parts: Annotated[tuple[str, ...], tyro.conf.Positional] = PARTS
    tools: tuple[str, ...] = TOOLS
    jobs: int = 4
    """Watched processes side by side."""
    minutes: float = 60
    """Of each of them."""
    here: bool = False
    """Run the parts in this process, without a tool."""


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def taylor(feature_dim: int, head_dim: int, dtype: torch.dtype, packed: bool) -> list[Tensor]:
    """Forward and backward over several strips, from the state that other tokens leave."""
    rows = 1 if packed else 2
    edges = torch.tensor([0, 1, 1, 70, LENGTH], device=DEVICE) if packed else None
    shape = (4 if packed else rows, HEADS, num_features(feature_dim))
    zero = torch.zeros(*shape, head_dim, device=DEVICE)
    sizes = (feature_dim, feature_dim, head_dim)
    q, k, v = (draw(rows, LENGTH, HEADS, size, dtype=dtype) for size in sizes)
    # Of numbers that no keys make the divisor may be next to nothing, and float16 overflow.
    _, numerator, normaliser, _, _ = launch.forward(
        q, k, v, zero, zero[..., 0].contiguous(), edges, want_state=True
    )
    q, k, v = (draw(rows, LENGTH, HEADS, size, dtype=dtype) for size in sizes)
    out, *final, inverse, states = launch.forward(
        q, k, v, numerator, normaliser, edges, want_state=True
    )
    d_out = draw(rows, LENGTH, HEADS, head_dim, dtype=dtype)
    gradients = launch.backward(q, k, v, edges, out, inverse, states, d_out, *final)
    return [out, *final, *gradients]


def mixers() -> None:
    """The other training kernels, through the mixers that have them."""
    recurrent = "mamba", "mamba2", "gated_linear_attention", "delta_net", "gated_delta_net", "rwkv7"
    window = "sliding_window_attention", {"num_heads": 3, "window": 9}
    for name, options in (("gated_convolution", {}), window, *((name, {}) for name in recurrent)):
        size = 64 if name in recurrent else 48
        mixer = build_mixer(name, size, **options).to(DEVICE)
        mixer(draw(2, 77, size))[0].sum().backward()
    hidden, head = draw(2, 5, 24).requires_grad_(), draw(2, 61, 24).requires_grad_()
    answers = torch.arange(5, device=DEVICE)
    stacked_cross_entropy(hidden, head, answers).sum().backward()


def visible_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in kernels that initcheck can follow: cuBLAS's outputs it takes for unwritten."""
    out = (x[..., None, :] * weight).sum(-1)
    return out if bias is None else out + bias


@mock.patch.object(torch.nn.functional, "linear", visible_linear)
def decoding(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], feature_dim: int) -> None:
    """Every decode kernel, in steps of few rows and of more; graphs would need the cache."""
    linear, window = "taylor_linear_attention", "sliding_window_attention"
    config = DecoderConfig(
        vocab_size=136,
        hidden_size=256,
        intermediate_size=128,
        mixers=("gated_convolution", linear, window, "softmax_attention"),
        mixer_options={
            linear: {"num_heads": 4, "feature_dim": feature_dim},
            window: {"num_heads": 4, "window": 5},
            "softmax_attention": {"num_heads": 2, "num_kv_heads": 1},
        },
    )
    many = taylor_decode.MANY
    for rows, limit, dtype in product(sizes, (many, 0), dtypes):
        taylor_decode.MANY = limit
        model = Decoder(config).to(DEVICE, dtype)
        state = model.init_state(rows, 64, recent=3)
        step = DecodeStep(model, state, [rows], graphs=False)
        samplings = [Sampling(0.0), Sampling(top_k=7, top_p=0.9, seed=1), *[Sampling()] * rows]
        options = sampling_rows(samplings[:rows], [0] * rows, config.vocab_size, step.tokens.device)
        step.set_rows(range(rows), torch.arange(rows, device=DEVICE) % config.vocab_size, options)
        found = [step.run(rows).logprobs.clone() for _ in range(9)]
        if torch.stack(found).isnan().any():
            raise SystemExit(f"NaN in a step of {rows} rows in {dtype}")
    taylor_decode.MANY = many


def taylor_cases(*choices: tuple) -> None:
    """Every combination of feature_dim, head_dim, dtype and packed."""
    launch.PROGRAMS, launch.BOUND = 2, {}
    if DEVICE == "cuda":
        torch.zeros(1, device=DEVICE)  # begins the context that the limit is of
        limit, size = STACK
        ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(limit, ctypes.c_size_t(size))
    names = "out", "final", "normaliser", "d_q", "d_k", "d_v", "d_initial", "d_normaliser"
    for case in product(*choices):
        if _unsupported(*case[:3]) is not None:
            continue
        found = [name for name, x in zip(names, taylor(*case), strict=True) if x.isnan().any()]
        if found:
            what = f"feature_dim, head_dim, dtype, packed = {case}"
            raise SystemExit(f"NaN in {', '.join(found)} at {what}")


def run_part(part: str) -> None:
    """The kernels of a part, once."""
    torch.manual_seed(0)
    kernels.HOPPER = part in ("hopper", "products")
    if part == "hopper":
        taylor_cases((16,), (16, 64, 112), (torch.bfloat16,), (False, True))
    elif part == "mixers":
        mixers()
    elif part == "decoding":
        decoding((1, 3, 7), (torch.float32, torch.bfloat16), 8)
    elif part == "products":
        decoding((2, 33, 128), (torch.bfloat16,), 16)
    else:
        dtypes = torch.bfloat16, torch.float16, torch.float32
        taylor_cases((int(part.removeprefix("taylor-")),), (17, 64, 112), dtypes, (False, True))


def complaints(report: str) -> tuple[list[str], int]:
    """What a tool found, one text each, and how often writes of one instruction met."""
    errors, same = [], 0
    lines = [line.removeprefix("=========").strip() for line in report.splitlines()]
    for here, line in enumerate(lines):
        if not re.match(r"(Error|Warning|Invalid|Uninitialized|Barrier|Program hit)", line):
            continue
        race = re.match(r".*Race reported between Write access at (\S+)", line)
        others = list(_others(lines[here + 1 :]))
        if race and others and all(f"Write access at {race[1]} " in other for other in others):
            same += sum(
                int(count) for other in others for count in re.findall(r"\[(\d+) haz", other)
            )
        else:
            errors.append(" ".join([line, *others]))
    return errors, same


def _others(lines: list[str]) -> Iterator[str]:
    """The accesses that a race's first line is followed by."""
    for line in lines:
        if not line.startswith("and "):
            return
        yield line


def watch(part: str, tool: str, sanitizer: str, minutes: float) -> dict[str, object]:
    """Runs a part under a tool; what it found."""
    command = [sanitizer, "--tool", tool, "--print-limit", "100000", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "benchmarks.sanitize", part, "--here"]
    began, ended, optimised = time.monotonic(), f"every kernel of {part} ran", True
    text, first = run_for(command, minutes, {}), None
    if ended not in text and not complaints(text)[0]:
        text, first, optimised = run_for(command, minutes, PLAINLY), text, False
    errors, same = complaints(text)
    if ended not in text:
        errors.append("did not come to its end: " + last_words(text))
    return {
        "errors": errors[:5],
        "count": len(errors),
        "same_store": same,
        "optimised": optimised,
        **({} if first is None else {"optimised_ended": last_words(first)}),
        "seconds": round(time.monotonic() - began),
    }


def run_for(command: list[str], minutes: float, variables: dict[str, str]) -> str:
    """What a command, and all that it started, printed in so many minutes."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **variables},
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=60 * minutes)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def last_words(text: str) -> str:
    """The end of a report; whose machine it was is nobody's business."""
    return re.sub(r"/\S*/", "", text.strip())[-600:]


def main(options: Options) -> None:
    """Every part under every tool; a row each."""
    for part in options.parts:
        if part not in PARTS:
            raise BasedError(f"no part {part}; parts are {', '.join(PARTS)}")
    if options.here:
        for part in options.parts:
            run_part(part)
            print(f"every kernel of {part} ran")
        return
    installed = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    sanitizer = shutil.which("compute-sanitizer") or next(map(str, installed), None)
    if sanitizer is None:
        raise BasedError(
            "compute-sanitizer is not on the PATH; it comes with NVIDIA's CUDA toolkit"
        )
    console, clean = Console(), True
    pairs = list(product(options.parts, options.tools))
    with ThreadPoolExecutor(options.jobs) as pool:
        works = {pool.submit(watch, *pair, sanitizer, options.minutes): pair for pair in pairs}
        for work in as_completed(works):
            (part, tool), found = works[work], work.result()
            clean &= not found["count"]
            add_row("sanitize", {"part": part, "tool": tool}, found)
            console.print(f"{part} {tool}: {found}", style="red" if found["count"] else "green")
    if not clean:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except BasedError as error:
        raise SystemExit(f"error: {error}") from None
