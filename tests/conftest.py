"""Shared fixtures. Every test starts from the same seed."""

import ast
import os
from collections.abc import Iterator

import jaxtyping._import_hook as hook
import pytest
import torch
from jaxtyping import config as hook_config

if not torch.cuda.is_available():
    # Before any kernel is defined: they are interpreted, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


def _is_unchecked(decorator: ast.AST, unchecked=hook._is_no_type_check) -> bool:
    """Kernels have no types, and the interpreter must see them undecorated."""
    return unchecked(decorator) or ast.unparse(decorator).startswith("triton.jit")


hook._is_no_type_check = _is_unchecked
# Tests are small and share the cores: threads that wait for each other cost minutes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unchecked_soak(request: pytest.FixtureRequest) -> Iterator[None]:
    """Annotations are checked by the short tests; over millions of calls that takes hours."""
    hook_config.update("jaxtyping_disable", request.node.get_closest_marker("soak") is not None)
    yield
    hook_config.update("jaxtyping_disable", False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A long test leaves a dated row of how it ended, with the properties that it recorded."""
    if report.when == "call" and "soak" in report.keywords and not os.getenv("PYTEST_XDIST_WORKER"):
        from benchmarks.rows import add_row

        found = {"outcome": report.outcome, **dict(report.user_properties)}
        row = {**found, "wall_seconds": round(report.duration)}
        add_row("soak", {"test": report.nodeid}, row)
