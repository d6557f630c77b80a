"""The kernels on Hopper in CUDA C++, where they take the place of Triton's.

`sum_states.cu`, `attend.cu`, `query_gradients.cu` and `key_gradients.cu` compute what the
Triton kernels of these names do, at feature_dim 16 in bfloat16, and fill the same tensors.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from based.ops import cuda, kernels
from based.ops.cuda import Argument

# As the sources have them: tokens of a segment, of a chunk of sum_states, rows of a state.
LENGTH, CHUNK, ROWS = 256, 64, 160
FEATURE_DIM = 16
LARGEST_HEAD_DIM = 128
# Chunks of sum_states in a ring, of which all but two are on their way.
STAGES = 6

StateTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def takes(x: Tensor, y: Tensor, *others: Tensor) -> bool:
    """Whether tensors [1, T, H, D] have the dtype, sizes and alignment that the kernels read.

    x is keys or queries, y has the values' size.
    """
    tensors = (x, y, *others)
    if not kernels.HOPPER or any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return False
    K, V = x.shape[3], y.shape[3]
    if K != FEATURE_DIM or V % 16 or not 16 <= V <= LARGEST_HEAD_DIM:
        return False
    aligned = all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(1) % 8 == 0 and tensor.stride(2) % 8 == 0
        for tensor in tensors
    )
    return aligned and cuda.is_hopper(x.device)


def sum_states(
    x: Tensor, y: Tensor, delta: Tensor | None, strips: Tensor, states: StateTensors
) -> None:
    """Fills `states` as `states.sum_states` does; of queries, where there is a delta."""
    H, V = y.shape[2:]
    run = _states_kernel(V, delta is not None, x.device)
    grid = len(strips) * H * (V // _columns(V))
    inputs = x, y, x if delta is None else delta, strips
    run(grid, 384, *inputs, *states, *_strides(x, y), x.shape[1], H)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    inverse: Tensor,
    segments: Tensor,
    states: StateTensors,
) -> None:
    """Fills `out` and `inverse` as `outputs.attend` does."""
    _run_segments("attend", (q, k, v), (out, inverse), segments, states, (q, k, v))


def query_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    d_out: Tensor,
    inverse: Tensor,
    g: Tensor,
    delta: Tensor,
    d_q: Tensor,
    segments: Tensor,
    states: StateTensors,
) -> None:
    """Fills `g`, `delta` and `d_q` as `gradients.query_gradients` does."""
    inputs, results = (q, k, v, out, d_out, inverse), (g, delta, d_q)
    _run_segments("query_gradients", inputs, results, segments, states, (q, k, v, d_out))


def key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    delta: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    segments: Tensor,
    states: StateTensors,
) -> None:
    """Fills `d_k` and `d_v` as `gradients.key_gradients` does."""
    inputs, results = (q, k, v, g, delta), (d_k, d_v)
    _run_segments("key_gradients", inputs, results, segments, states, (q, k, v))


def _run_segments(
    name: str,
    inputs: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    segments: Tensor,
    states: StateTensors,
    strided: tuple[Tensor, ...],
) -> None:
    """One of the kernels that read states: a block has a segment and a head."""
    T, H, V = strided[2].shape[1:]
    numerator, normaliser, before, before_normaliser = states
    run = _segment_kernel(name, V, before.numel() > 0, segments.device)
    # Sixteen segments read a strip's: half of its bytes are worth one more small kernel.
    sums = numerator, normaliser, before.to(numerator.dtype), before_normaliser
    sizes = *_strides(*strided), T, H, FEATURE_DIM**-0.5
    run(len(segments) * H, 256, *inputs, *results, segments, *sums, *sizes)


def _strides(*tensors: Tensor) -> list[Argument]:
    return [stride for x in tensors for stride in x.stride()[1:3]]


@cache
def _segment_kernel(name: str, V: int, strips: bool, device: torch.device) -> Callable[..., None]:
    panels = -(-V // 64)
    shared = panels * 128 * (ROWS + LENGTH) + LENGTH * 32 + 1024
    return cuda.compile_kernel(name, segment_source(name, V, strips), shared, device)


@cache
def _states_kernel(V: int, queries: bool, device: torch.device) -> Callable[..., None]:
    shared = STAGES * CHUNK * (128 + 32) + 3 * CHUNK * 16
    return cuda.compile_kernel("sum_states", states_source(V, queries), shared, device)


def segment_source(name: str, V: int, strips: bool) -> str:
    """The text of a kernel that reads states, with those of strips or without."""
    wide = V <= 64 and name == "attend"
    keys = 64 if wide else 32
    constants = {
        "V": V,
        "STRIPS": strips,
        # Keys whose weights, and blocks of features whose products, are in registers together.
        "KEYS": keys,
        "BATCH": 5 if wide else 2,
        # Whether the next features' gradients are computed beside the present ones' use.
        "AHEAD": V <= 64 or (not strips and V <= 112),
        "ADD_V": f"add_{V}",
        "START_KEYS": f"start_{keys}",
        "ADD_KEYS": f"add_{keys}",
    }
    shared = ["segment.cuh"] if name == "attend" else ["segment.cuh", "gradients.cuh"]
    files = [_file(file) for file in (*shared, f"{name}.cu")]
    return cuda.source_of(files, constants, (V, keys, 32, 16))


def states_source(V: int, queries: bool) -> str:
    """The text of `sum_states`."""
    N = _columns(V)
    constants = {"V": V, "N": N, "QUERIES": queries, "STAGES": STAGES, "ADD_N": f"add_{N}"}
    return cuda.source_of([_file("sum_states.cu")], constants, (N, 8))


def _columns(V: int) -> int:
    """Columns of values of one block: more would cost the second block on a multiprocessor."""
    return V if V <= 64 else V // 2


def _file(name: str) -> Path:
    return Path(__file__).with_name(name)
