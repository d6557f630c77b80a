"""Based as Hugging Face models: a configuration, a cache and a causal language model.

Thin over `Decoder`: everything that computes is there. The Auto classes know these
once `based.models` is imported (`based.models.auto_classes`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from based.models.huggingface.cache import BasedCache
    from based.models.huggingface.config import BasedConfig
    from based.models.huggingface.modeling import BasedForCausalLM

__all__ = ["BasedCache", "BasedConfig", "BasedForCausalLM"]

# Each loads by itself: the configuration must not wait for transformers' modelling code.
_MODULES = {"BasedCache": "cache", "BasedConfig": "config", "BasedForCausalLM": "modeling"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
