"""Shared fixtures. Every test starts from the same seed."""

import ast
import os

import jaxtyping._import_hook as hook
import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is defined: they are interpreted, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


def _is_unchecked(decorator: ast.AST, unchecked=hook._is_no_type_check) -> bool:
    """Kernels have no types, and the interpreter must see them undecorated."""
    return unchecked(decorator) or ast.unparse(decorator).startswith("triton.jit")


hook._is_no_type_check = _is_unchecked
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
