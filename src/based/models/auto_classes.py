"""Registration with transformers' Auto classes, paid for only by who uses those.

Importing transformers takes seconds, and a program that trains or generates here
never needs it: our classes register when its Auto classes are imported, or at once
if that has happened.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# transformers' module, and ours that registers with it when imported
REGISTERS = {
    "transformers.models.auto.configuration_auto": "based.models.huggingface.config",
    "transformers.models.auto.modeling_auto": "based.models.huggingface.modeling",
}


class _RegisterAfter(MetaPathFinder):
    """Finds nothing itself: follows the import of `name` by that of our module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders have, for the one name."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute: Any = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(fullname)

            spec.loader.exec_module = execute_and_register
        return spec


def register_auto_classes() -> None:
    """Makes `AutoConfig` and `AutoModelForCausalLM` know our models, now or once imported."""
    for theirs in REGISTERS:
        if theirs in sys.modules:
            _register(theirs)
        else:
            sys.meta_path.insert(0, _RegisterAfter(theirs))


def _register(theirs: str) -> None:
    # A transformers too old for our classes must go on working without them.
    with suppress(ImportError):
        import_module(REGISTERS[theirs])
