"""`based convert`: an official checkpoint becomes a model of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from based.errors import BasedError

if TYPE_CHECKING:
    from based.models.convert.source import Source
    from based.models.convert.tensors import Mapped

# The tokenizer that the published checkpoints were trained with; their own files lack it.
PUBLISHED_TOKENIZER = "openai-community/gpt2"


@dataclass(frozen=True)
class Convert:
    """Read an official Based, attention or Mamba checkpoint and save it as a model of ours.

    Prints what each of its tensors became, which were dropped and why, and where in
    its config.json the model's dials were found.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A directory with config.json and weights, or a hub id such as hazyresearch/based-360m."""
    out: Annotated[Path, tyro.conf.Positional]
    """The directory to write."""
    revision: str | None = None
    """Of a hub id: a branch, tag or pull request, e.g. refs/pr/1."""
    tokenizer: str | None = None
    """A tokenizer.json, or a hub id with one; by default the source's, or GPT-2's for a hub id."""
    verify: bool = False
    """Check that weights are finite and that the model's steps give what its parallel form does."""


def run(config: Convert) -> None:
    """Converts, reports, and publishes the model whole."""
    from rich.console import Console

    from based.models.checkpoint import save_model
    from based.models.convert.conversion import convert
    from based.models.convert.source import Source
    from based.models.convert.verify import verify

    console, source = Console(), Source(config.source, config.revision)
    with console.status(f"reading {config.source}"):
        model, mapped = convert(source)
        tokenizer = _tokenizer(config, source)
    _report(mapped)
    if config.verify:
        with console.status("verifying"):
            error = verify(model)
        console.print(
            f"verified: steps and parallel form agree to {error:.0e} of the logits' spread"
        )
    with console.status(f"writing {config.out}"):
        save_model(model, config.out, tokenizer)
    console.print(f"{model.num_parameters():,} parameters in {model.dtype} -> {config.out}")
    if tokenizer is None:
        console.print("without a tokenizer: the source has none; give --tokenizer to add one")


def _tokenizer(config: Convert, source: Source) -> Path | None:
    from based.models.checkpoint import TOKENIZER
    from based.models.convert.source import Source

    if config.tokenizer is None:
        found = source.tokenizer()
        return found if found or source.is_local else Source(PUBLISHED_TOKENIZER).tokenizer()
    if Path(config.tokenizer).is_file():
        return Path(config.tokenizer)
    found = Source(config.tokenizer).tokenizer()
    if found is None:
        raise BasedError(f"there is no {TOKENIZER} in {config.tokenizer}")
    return found


def _report(mapped: Mapped) -> None:
    """A line for each kind of tensor and each setting; a table's cells would break the names."""
    lines = [(name, f"x{count}", new) for (name, new), count in mapped.renamed.items()]
    lines += [(name, "x1", f"dropped: {reason}") for name, reason in mapped.dropped.items()]
    width = max(len(name) for name, _, _ in lines)
    for name, count, what in lines:
        print(f"{name:<{width}} {count:>4}  {what}")
    for name, origin in mapped.dials.items():
        value = mapped.config.mixer_options.get(name) or getattr(mapped.config, name)
        print(f"{name}: {value} (from {origin})")
