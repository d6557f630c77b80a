"""Recipes: the paper's training runs, as options of `based train` (paper section 6 and its code).

All models share one: AdamW at 8e-4 with a cosine to a tenth of it, betas 0.9 and 0.95,
weight decay 0.1 on matrices, clipping at 1.0, and steps of 256 sequences of 2,048
tokens (524,288). A recipe leaves the data to the user; the paper's is the Pile with
GPT-2's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from based.errors import BasedError

Options = dict[str, Any]


def paper_10b(preset: str, micro_batch: int) -> Options:
    """10 billion tokens: 20,000 steps, 200 of them warm-up."""
    return _paper(preset, micro_batch, steps=20_000, warmup_steps=200)


def paper_50b(preset: str, micro_batch: int) -> Options:
    """50 billion tokens: 100,000 steps, 1,000 of them warm-up."""
    return _paper(preset, micro_batch, steps=100_000, warmup_steps=1_000)


def _paper(preset: str, micro_batch: int, steps: int, warmup_steps: int) -> Options:
    return {
        "preset": preset,
        "steps": steps,
        "warmup_steps": warmup_steps,
        "batch_size": 256,
        "length": 2048,
        "micro_batch": micro_batch,
        "learning_rate": 8e-4,
        "final_learning_rate": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.1,
        "clip": 1.0,
        "compile": True,
        "evaluate_every": 1_000,
        "evaluate_windows": 512,
        "checkpoint_every": 500,
        "seed": 1111,
    }


# Micro-batches of 32k tokens at 360M and 16k at 1.3B: compiled, within a GPU of 80 GB.
RECIPES: dict[str, Callable[[], Options]] = {
    "based-360m-10b": lambda: paper_10b("based-360m", 16),
    "based-360m-50b": lambda: paper_50b("based-360m", 16),
    "based-1.3b-10b": lambda: paper_10b("based-1.3b", 8),
    "based-1.3b-50b": lambda: paper_50b("based-1.3b", 8),
    "attn-360m-10b": lambda: paper_10b("attn-360m", 16),
    "attn-360m-50b": lambda: paper_50b("attn-360m", 16),
    "attn-1.3b-10b": lambda: paper_10b("attn-1.3b", 8),
    "attn-1.3b-50b": lambda: paper_50b("attn-1.3b", 8),
}


def recipe(name: str) -> Options:
    """The named recipe's options of `TrainConfig`, all but `data`."""
    if name not in RECIPES:
        raise BasedError(f"no recipe is named {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()


def as_arguments(options: Options) -> list[str]:
    """The same on a command line, where what stands later wins."""
    arguments: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments
