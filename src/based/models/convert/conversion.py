"""From an official checkpoint to a decoder, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from based.errors import BasedError
from based.models.checkpoint import decoder
from based.models.convert import gpt, mamba
from based.models.convert.source import Source
from based.models.convert.tensors import Mapped
from based.models.decoder import Decoder

# A family is known by how its tensors' names begin.
FAMILIES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Mapped]] = {
    "transformer.": gpt.convert,
    "backbone.": mamba.convert,
}


def convert(source: Source) -> tuple[Decoder, Mapped]:
    """The checkpoint as our decoder, in the dtype it has, and the account of how.

    Anything unexpected in it is a `BasedError`.
    """
    values, tensors = source.config(), _named(source.tensors())
    family = next((f for f in FAMILIES if any(name.startswith(f) for name in tensors)), None)
    if family is None:
        some = ", ".join(sorted(tensors)[:2])
        raise BasedError(f"{source.name} is of no family known here; it has tensors {some}, ...")
    mapped = FAMILIES[family](values, tensors)
    return decoder(mapped.config, mapped.tensors, source.name), mapped


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the `model.` that a training checkpoint puts before every name."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
