"""Decoding on the CPU: memory and time a token at short and long contexts; prefill's cost.

Based's state is measured after real prompts of that length. The Transformer's KV
cache is filled with random keys and values, which costs decoding the same.
"""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from based.generation import prefill
from based.models import Decoder, DecoderState, preset
from based.models.command import human
from benchmarks.rows import median_seconds, write_rows

CONTEXTS = (1_000, 10_000, 100_000)
PROMPT = 8192


def state_at(model: Decoder, context: int) -> DecoderState:
    """The state of one sequence after `context` random tokens."""
    if all(mixer.fixed_state for mixer in model.mixers()):
        tokens = torch.randint(model.config.vocab_size, (1, context))
        return prefill(model, tokens, model.init_state(1))[1]
    state = model.init_state(1, context)
    for layer in state:
        for name, tensor in layer.items():
            if name == "length":
                tensor.fill_(context)
            else:
                tensor.normal_()
    return state


@torch.no_grad()
def decode_cost(model: Decoder, context: int, tokens: int = 60) -> tuple[int, float]:
    """State bytes, and median milliseconds a token, of one sequence at that context."""
    warmup = 5
    state = state_at(model, context)
    size, times = state.nbytes, []
    for _ in range(tokens + warmup):
        token = torch.randint(model.config.vocab_size, (1,))
        began = time.perf_counter()
        model.step(token, state)
        times.append(time.perf_counter() - began)
    return size, 1000 * statistics.median(times[warmup:])


@torch.no_grad()
def prefill_cost(model: Decoder, tokens: int = PROMPT) -> tuple[float, float]:
    """Median seconds of prefilling a prompt, and of the plain forward pass over it."""
    prompt = torch.randint(model.config.vocab_size, (1, tokens))
    whole = median_seconds(lambda: prefill(model, prompt, model.init_state(1)))
    plain = median_seconds(lambda: model(prompt))
    return whole, plain


def main() -> None:
    torch.set_num_threads(2)
    rows = []
    for name in ("based-tiny", "attn-tiny"):
        model = Decoder(preset(name)).eval()
        for context in CONTEXTS:
            # Three rounds, so that the spread between them tells noise from growth.
            rounds = [decode_cost(model, context, 200) for _ in range(3)]
            milliseconds = [ms for _, ms in rounds]
            rows.append(
                {
                    "model": name,
                    "parameters": model.num_parameters(),
                    "context": context,
                    "state_bytes": rounds[0][0],
                    "ms_per_token": statistics.median(milliseconds),
                    "ms_lowest": min(milliseconds),
                    "ms_highest": max(milliseconds),
                }
            )
    model = Decoder(preset("based-tiny")).eval()
    whole, plain = prefill_cost(model)
    rows.append(
        {
            "model": "based-tiny",
            "prompt": PROMPT,
            "prefill_seconds": whole,
            "forward_seconds": plain,
            "prefill_over_forward": whole / plain,
        }
    )
    show(rows)
    Console().print(f"wrote {write_rows('decoding', rows)}")


def show(rows: list[dict]) -> None:
    table = Table(
        "model", "context", "state", "ms a token", "range of 3", title="decoding, batch 1"
    )
    for row in rows:
        if "context" in row:
            table.add_row(
                row["model"],
                f"{row['context']:,}",
                human(row["state_bytes"]),
                f"{row['ms_per_token']:.3f}",
                f"{row['ms_lowest']:.3f} to {row['ms_highest']:.3f}",
            )
        else:
            title = f"prefill of {row['prompt']} tokens costs {row['prefill_over_forward']:.2f}"
            table.caption = f"{title} times the forward pass"
    Console().print(table)


if __name__ == "__main__":
    main()
