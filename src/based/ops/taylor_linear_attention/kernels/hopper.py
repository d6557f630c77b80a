"""Forward kernels on Hopper in CUDA C++, where they take the place of Triton's.

`attend.cu` computes what `outputs.attend` does, `sum_states.cu` what `states.sum_states`
does, at feature_dim 16 in bfloat16.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from based.ops import cuda
from based.ops.cuda import Argument

LENGTH = 256
FEATURE_DIM = 16
LARGEST_HEAD_DIM = 128
# Chunks of 64 tokens in a ring, of which all but two are on their way.
STAGES = 6


def takes(x: Tensor, y: Tensor, *others: Tensor) -> bool:
    """Whether tensors [1, T, H, D] have the dtype, sizes and alignment that the kernels read."""
    tensors = (x, y, *others)
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return False
    K, V = x.shape[3], y.shape[3]
    if K != FEATURE_DIM or V % 16 or not 16 <= V <= LARGEST_HEAD_DIM:
        return False
    aligned = all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(1) % 8 == 0 and tensor.stride(2) % 8 == 0
        for tensor in tensors
    )
    return aligned and cuda.is_hopper(x.device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    inverse: Tensor,
    segments: Tensor,
    states: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fills `out` and `inverse` as `outputs.attend` does."""
    H, V = v.shape[2:]
    run = attend_kernel(V, states[2].numel() > 0, q.device)
    run(
        len(segments) * H,
        256,
        *(q, k, v, out, inverse, segments),
        *states,
        *_strides(q, k, v),
        q.shape[1],
        H,
        FEATURE_DIM**-0.5,
    )


def sum_states(
    x: Tensor,
    y: Tensor,
    delta: Tensor | None,
    strips: Tensor,
    states: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fills `states` as `states.sum_states` does; of queries, where there is a delta."""
    H, V = y.shape[2:]
    run = states_kernel(V, delta is not None, x.device)
    grid = len(strips) * H * (V // _columns(V))
    inputs = x, y, x if delta is None else delta, strips
    run(grid, 384, *inputs, *states, *_strides(x, y), x.shape[1], H)


def _strides(*tensors: Tensor) -> list[Argument]:
    return [stride for x in tensors for stride in x.stride()[1:3]]


@cache
def attend_kernel(V: int, strips: bool, device: torch.device) -> Callable[..., None]:
    """The kernel for one head_dim, with states of strips or without, on one GPU."""
    return cuda.compile_kernel("attend", attend_source(V, strips), attend_memory(V), device)


@cache
def states_kernel(V: int, queries: bool, device: torch.device) -> Callable[..., None]:
    """The kernel for one head_dim, of keys or of queries, on one GPU."""
    source = states_source(V, queries)
    return cuda.compile_kernel("sum_states", source, STAGES * 64 * (128 + 32) + 3 * 64 * 16, device)


def attend_source(V: int, strips: bool) -> str:
    """The text of `attend`."""
    keys = 64 if V <= 64 else 32
    constants = {
        "V": V,
        "STRIPS": strips,
        # Keys whose weights, and blocks of features whose products, are in registers together.
        "KEYS": keys,
        "BATCH": 5 if V <= 64 else 2,
        "ADD_V": f"add_{V}",
        "START_KEYS": f"start_{keys}",
    }
    return cuda.source_of(_file("attend"), constants, (V, keys))


def attend_memory(V: int) -> int:
    """Bytes of its shared memory: state and values in panels of 64 columns, keys, the mixer."""
    panels = -(-V // 64)
    return panels * 128 * (160 + LENGTH) + LENGTH * 32 + 1024


def states_source(V: int, queries: bool) -> str:
    """The text of `sum_states`."""
    N = _columns(V)
    constants = {"V": V, "N": N, "QUERIES": queries, "STAGES": STAGES, "ADD_N": f"add_{N}"}
    return cuda.source_of(_file("sum_states"), constants, (N, 8))


def _columns(V: int) -> int:
    """Columns of values of one block: more would cost the second block on a multiprocessor."""
    return V if V <= 64 else V // 2


def _file(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cu")
