"""Shared fixtures. Every test starts from the same seed."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
