"""Renaming a checkpoint's tensors by rules, with an account of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from based.errors import BasedError
from based.models.config import DecoderConfig


@dataclass(frozen=True)
class Mapped:
    """What a family makes of a checkpoint: our configuration, our tensors, and the account."""

    config: DecoderConfig
    tensors: dict[str, Tensor]
    renamed: Counter[tuple[str, str]]
    """How many tensors had this name and got that one, layer numbers written *."""
    dropped: dict[str, str]
    """Names of tensors that are not needed, and why."""
    dials: dict[str, str] = field(default_factory=dict)
    """Where the configuration's values came from."""


def rename(
    tensors: Mapping[str, Tensor], rules: Mapping[str, str], unneeded: Mapping[str, str]
) -> tuple[dict[str, Tensor], Counter[tuple[str, str]], dict[str, str]]:
    """Our names for theirs. `rules`: pattern to replacement; `unneeded`: pattern to reason.

    A name that no pattern matches whole is a `BasedError`.
    """
    ours: dict[str, Tensor] = {}
    renamed: Counter[tuple[str, str]] = Counter()
    dropped: dict[str, str] = {}
    for name, tensor in tensors.items():
        reason = next((why for p, why in unneeded.items() if re.fullmatch(p, name)), None)
        if reason is not None:
            dropped[name] = reason
            continue
        rule = next((p for p in rules if re.fullmatch(p, name)), None)
        if rule is None:
            raise BasedError(
                f"the checkpoint has a tensor {name} {tuple(tensor.shape)}, which no model here has"
            )
        new = re.sub(rule, rules[rule], name)
        ours[new] = tensor
        renamed[_starred(name), _starred(new)] += 1
    return ours, renamed, dropped


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
