"""Packed batches: several sequences end to end in one row, `cu_seqlens` their boundaries."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

F = TypeVar("F", bound=Callable[..., Any])
# What was worked out of boundaries that are still there, and the version that they had.
_tables = WeakTensorKeyDictionary()
_thread = threading.local()


def once_a_batch(function: F) -> F:
    """Works out something of `cu_seqlens` and numbers once for all layers of a model.

    What is compiled or captured works it out for itself: its boundaries will be others. A
    capture may say that these are its own (`captured_with`).
    """

    @wraps(function)
    def kept(cu_seqlens: Tensor, *numbers: int) -> object:
        if torch.compiler.is_compiling() or not (_stays(cu_seqlens) or _is_own(cu_seqlens)):
            return function(cu_seqlens, *numbers)
        version, tables = _tables.get(cu_seqlens) or (None, {})
        if version != cu_seqlens._version:
            tables = {}
            _tables[cu_seqlens] = cu_seqlens._version, tables
        key = function, *numbers
        if key not in tables:
            tables[key] = function(cu_seqlens, *numbers)
        return tables[key]

    return cast("F", kept)


@contextmanager
def captured_with(cu_seqlens: Int[Tensor, " E"]) -> Iterator[None]:
    """Whoever captures a call on boundaries that were made within the same capture enters this."""
    _thread.own = cu_seqlens
    try:
        yield
    finally:
        _thread.own = None


def _is_own(cu_seqlens: Tensor) -> bool:
    return getattr(_thread, "own", None) is cu_seqlens


def _stays(cu_seqlens: Tensor) -> bool:
    """Whether it would be seen if its numbers changed."""
    captured = cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    return not captured and not cu_seqlens.is_inference()


@once_a_batch
def sequence_ids(cu_seqlens: Int[Tensor, " E"], length: int) -> Int[Tensor, " T"]:
    """Which sequence each of the `length` tokens belongs to."""
    token = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


@once_a_batch
def positions(cu_seqlens: Int[Tensor, " E"], length: int) -> Int[Tensor, " T"]:
    """Each token's position in its own sequence, from 0."""
    token = torch.arange(length, device=cu_seqlens.device)
    return token - cu_seqlens[sequence_ids(cu_seqlens, length)]


@once_a_batch
def longest(cu_seqlens: Int[Tensor, " E"]) -> int:
    """Tokens of the longest sequence; waits for a GPU."""
    return int(cu_seqlens.diff().max())
