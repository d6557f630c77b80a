"""`based info`: what a model is and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from based.errors import BasedError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from based.models.decoder import Decoder

CONTEXTS = {"2k": 2048, "32k": 32768, "1M": 1 << 20}
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


@dataclass(frozen=True)
class Info:
    """Print a model's parameters, layers, and the memory one sequence needs."""

    model: Annotated[str, tyro.conf.Positional]
    """A preset's name, a run of `based train`, or a saved model's directory."""
    feature_dim: int | None = None
    """Dial of a preset: features a query and key are projected to."""
    window: int | None = None
    """Dial of a preset: keys a query sees, its own included."""
    budget: str | None = None
    """List the (feature_dim, window) settings whose state fits, e.g. 4MB or 500kB."""


def run(config: Info) -> None:
    """Prints the tables."""
    import torch
    from rich.console import Console

    from based.models.checkpoint import model_folder, read_config
    from based.models.presets import PRESETS, preset
    from based.models.skeleton import skeleton

    console = Console()
    if config.budget is not None:
        _print_budget(console, config.model, _parse_bytes(config.budget))
        return
    if config.model in PRESETS or not Path(config.model).exists():
        shape = preset(config.model, feature_dim=config.feature_dim, window=config.window)
    elif config.feature_dim is not None or config.window is not None:
        raise BasedError(
            "a saved model's dials are fixed; --feature-dim and --window are for presets"
        )
    else:
        shape = read_config(model_folder(config.model))
    _print_model(console, config.model, skeleton(shape), torch.bfloat16)


def _print_model(console: Console, name: str, model: Decoder, dtype: torch.dtype) -> None:
    from rich.table import Table

    from based.models.accounting import layer_costs, transformer_cache_bytes

    options = model.config.mixer_options
    console.print(
        f"[bold]{name}[/]: {model.num_parameters():,} parameters, {len(model.blocks)} layers of "
        f"width {model.config.hidden_size}, MLP {model.config.intermediate_size or 'none'}, "
        f"vocabulary {model.config.vocab_size:,} (embedding tied)"
    )
    table = Table(title="Layers; state of one sequence in bfloat16")
    table.add_column("mixer", no_wrap=True)
    table.add_column("layers")
    table.add_column("options")
    for heading in ("parameters each", "state each", "state all"):
        table.add_column(heading, justify="right")
    for cost in layer_costs(model, CONTEXTS["2k"], dtype):
        table.add_row(
            cost.mixer,
            " ".join(map(str, cost.layers))
            if len(cost.layers) < 12
            else f"the other {len(cost.layers)}",
            ", ".join(f"{key} {value}" for key, value in options.get(cost.mixer, {}).items()),
            f"{cost.parameters:,}",
            human(cost.state_bytes) + ("" if cost.fixed_state else " at 2k"),
            human(cost.state_bytes * len(cost.layers)),
        )
    console.print(table)
    memory = Table("context", title="Memory of one sequence")
    memory.add_column("this model", justify="right")
    layers, _ = transformer_cache_bytes(model, 1, dtype)
    memory.add_column(f"Transformer++ of this size ({layers} layers)", justify="right")
    memory.add_column("ratio", justify="right")
    for label, length in CONTEXTS.items():
        own = model.state_bytes(length, dtype)
        _, cache = transformer_cache_bytes(model, length, dtype)
        memory.add_row(label, human(own), human(cache), f"{cache / own:,.1f}x")
    console.print(memory)


def _print_budget(console: Console, name: str, budget: int) -> None:
    import torch
    from rich.table import Table

    from based.models.accounting import settings_within

    rows = settings_within(name, budget, torch.bfloat16)
    if not rows:
        raise BasedError(f"no setting of {name} fits {human(budget)}; the budget is too small")
    table = Table(title=f"{name}: settings whose state fits {human(budget)} a sequence")
    for heading in ("feature_dim", "window", "state", "of the budget"):
        table.add_column(heading, justify="right")
    for feature_dim, window, size in rows:
        table.add_row(str(feature_dim), str(window), human(size), f"{size / budget:.0%}")
    console.print(table)


def _parse_bytes(text: str) -> int:
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        return int(float(digits) * UNITS[unit])
    except (ValueError, KeyError):
        raise BasedError(
            f"--budget {text!r} is not a size; write e.g. 500kB, 4MB or 2MiB"
        ) from None


def human(size: int | float) -> str:
    """Bytes with a decimal unit, three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
