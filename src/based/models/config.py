"""The decoder's configuration: what `config.json` of a saved model holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from based.errors import BasedError


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. `mixers`, one registry name a layer, builds its layers.

    `mixer_options[name]` are the keyword arguments of every mixer of that name.
    `vocab_size` counts the rows of the embedding, padding included. With
    `intermediate_size` 0 a layer is its mixer alone, as Mamba's are.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    mixers: tuple[str, ...]
    mixer_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 1), ("hidden_size", 1), ("intermediate_size", 0)):
            if getattr(self, name) < least:
                raise BasedError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.mixers:
            raise BasedError("mixers is empty; name one mixer for each layer")

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**asdict(self), "mixers": list(self.mixers)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DecoderConfig:
        """The inverse of `to_dict`; an unknown or missing field is a `BasedError`."""
        known = {f.name for f in fields(DecoderConfig)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise BasedError(f"config has unknown fields: {', '.join(unknown)}")
        try:
            return DecoderConfig(**{**values, "mixers": tuple(values["mixers"])})
        except (KeyError, TypeError) as error:
            raise BasedError(f"config is incomplete or malformed: {error}") from error
