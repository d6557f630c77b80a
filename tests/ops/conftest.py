"""Triton kernels in the interpreter, on the CPU."""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of kernels so that they run interpreted; afterwards as they were."""
    modules: list[ModuleType] = []
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")

        def load(name: str) -> ModuleType:
            modules.append(importlib.reload(importlib.import_module(name)))
            return modules[-1]

        yield load
    for module in modules:
        importlib.reload(module)
