"""What bounds a decode step: the device's measured copy rate, and bytes that must move.

Also the pieces of `benchmarks.generation` below the engine: kernels against the copy
rate, and the error of a state over many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from based.generation import Engine, EngineConfig
from based.mixers import State
from based.models import Decoder
from based.ops.few_rows_linear import Residual, linear, norm_linear_swiglu
from based.ops.few_rows_linear.weights import rows_of
from based.ops.gated_short_convolution import gated_short_convolution_step
from based.ops.rotary import frequencies_on
from based.ops.sliding_window_attention import attention_step
from based.ops.taylor_linear_attention import (
    num_features,
    split_halves,
    taylor_linear_attention_deferred_step,
    taylor_linear_attention_step,
)
from benchmarks.state_error import Stored, step_errors
from benchmarks.timing import copy_rate, matmul_rate, median_device_seconds

# based-1.3b and based-360m.
HEAD_DIMS = (112, 64)
HEADS, K, WINDOW, RECENT = 16, 16, 129, EngineConfig.recent


def decode_floor(
    model: Decoder, batch: int, context: int, engine: Engine, device: torch.device
) -> dict[str, float]:
    """Least time of a step: weights read once or multiplied, then each row's state moved."""
    weights = sum(map(weight_bytes, model.parameters()))
    products = 2 * batch * model.num_parameters() / matmul_rate(device)
    state = sum(layer_bytes(layer, context) for layer in engine.pool.state) * batch
    seconds = max(weights / copy_rate(device), products) + state / copy_rate(device)
    return {
        "floor_ms": 1000 * seconds,
        "floor_state_bytes": state,
        "copy_bytes_per_second": copy_rate(device),
    }


def weight_bytes(weight: Tensor) -> int:
    """What a product reads of it: a quantised one's `nbytes` are those of what it stands for."""
    found = rows_of(weight)
    return weight.nbytes if found is None else sum(x.nbytes for x in found if x is not None)


def layer_bytes(layer: State, context: int) -> float:
    """Bytes of one row that a step reads and writes."""
    total = 0.0
    for name, tensor in layer.items():
        size = tensor[0].nbytes
        if name in ("keys", "values"):
            # Read up to the context; one token is written.
            slots = tensor.shape[1]
            total += size * (min(context, slots) + 1) / slots
        elif name in ("numerator", "denominator") and "recent_keys" in layer:
            total += size * (1 + 1 / layer["recent_keys"].shape[1])
        elif name == "numerator_halves":
            # The upper half each token, and all when a ring is folded.
            total += size * (0.5 + 1.5 / layer["recent_keys"].shape[1])
        elif name in ("recent_keys", "recent_values"):
            total += size / 2
        else:
            total += 2 * size
    return total


Cells = Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]


def kernel_cells(batches: tuple[int, ...], device: torch.device) -> Cells:
    """Each decode kernel at the sizes of based-1.3b and based-360m."""
    for batch in batches:
        for head_dim in HEAD_DIMS:
            made = KERNELS if batch > 1 else {**KERNELS, **ONE_ROW}
            for name, make in made.items():
                key = {"kernel": name, "batch": batch, "head_dim": head_dim}
                yield key, lambda m=make, b=batch, d=head_dim: _kernel(m, b, d, device)


def _kernel(make: Callable, batch: int, head_dim: int, device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        call, moved = make(batch, head_dim, dtype)
    seconds = median_device_seconds(call, device)
    rate = moved / seconds
    return {
        "us": 1e6 * seconds,
        "bytes": moved,
        "bytes_per_second": rate,
        "share_of_copy_rate": rate / copy_rate(device),
    }


Made = tuple[Callable[[], Tensor], float]


def _taylor(batch: int, V: int, dtype: torch.dtype, recent: int) -> Made:
    q, k, v = (torch.randn(batch, HEADS, D, dtype=dtype) for D in (K, K, V))
    state = State(
        numerator=torch.rand(batch, HEADS, num_features(K), V),
        denominator=torch.ones(batch, HEADS, num_features(K)),
    )
    if not recent:
        moved = batch * layer_bytes(state, 0)
        return lambda: taylor_linear_attention_step(q, k, v, **state), moved
    for name, D in (("recent_keys", K), ("recent_values", V)):
        state[name] = torch.randn(batch, recent, HEADS, D, dtype=dtype)
    S, z, ring_k, ring_v = state.values()
    if dtype == torch.bfloat16:
        S = state["numerator_halves"] = split_halves(state.pop("numerator"))
    # Rows fill their rings at different times, as in a busy engine.
    seen, moved = torch.arange(batch), batch * layer_bytes(state, 0)
    return lambda: taylor_linear_attention_deferred_step(q, k, v, S, z, ring_k, ring_v, seen), moved


def _attention(batch: int, D: int, dtype: torch.dtype, slots: int) -> Made:
    q, k, v = (torch.randn(batch, HEADS, D, dtype=dtype) for _ in range(3))
    keys, values = (torch.randn(batch, slots, HEADS, D, dtype=dtype) for _ in range(2))
    seen = torch.full((batch,), slots)
    frequencies = frequencies_on(q.device, D)
    moved = float(keys.nbytes + values.nbytes)
    return lambda: attention_step(q, k, v, keys, values, seen, frequencies), moved


def _convolution(batch: int, D: int, dtype: torch.dtype) -> Made:
    channels = 2 * HEADS * D
    projected = torch.randn(batch, 2 * channels, dtype=dtype)
    weight, past = torch.randn(channels, 3, dtype=dtype), torch.zeros(batch, 2, channels).to(dtype)
    moved = float(2 * past.nbytes + 1.5 * projected.nbytes)
    return lambda: gated_short_convolution_step(projected, weight, past), moved


def _products(batch: int, D: int, dtype: torch.dtype, gated: bool) -> Made:
    """An MLP's projections, each call with weights that no cache holds any more."""
    C, hidden = HEADS * D, 2 * HEADS * D
    shape = (2 * hidden, C) if gated else (C, hidden)
    layers = [nn.Linear(shape[1], shape[0], bias=False, dtype=dtype) for _ in range(16)]
    turn, x = cycle(layers), torch.randn(batch, C)
    residual = Residual(x, x.to(dtype), torch.ones(C, dtype=dtype), 1e-5)
    inner, moved = torch.randn(batch, hidden, dtype=dtype), float(layers[0].weight.nbytes)
    if gated:
        return lambda: norm_linear_swiglu(residual, next(turn))[1], moved

    def back() -> Tensor:
        y = linear(inner, next(turn))
        assert isinstance(y, Tensor)  # of one row
        return y

    return back, moved


KERNELS: dict[str, Callable[[int, int, torch.dtype], Made]] = {
    "taylor_step": lambda batch, D, dtype: _taylor(batch, D, dtype, 0),
    "taylor_deferred_step": lambda batch, D, dtype: _taylor(batch, D, dtype, RECENT),
    "window_step": lambda batch, D, dtype: _attention(batch, D, dtype, WINDOW),
    "attention_step_1k": lambda batch, D, dtype: _attention(batch, D, dtype, 1024),
    "attention_step_4k": lambda batch, D, dtype: _attention(batch, D, dtype, 4096),
    "convolution_step": _convolution,
}

# Only where steps take them.
ONE_ROW: dict[str, Callable[[int, int, torch.dtype], Made]] = {
    "norm_fc1_swiglu": partial(_products, gated=True),
    "fc2": partial(_products, gated=False),
}


def state_cells(marks: tuple[int, ...], device: torch.device) -> Cells:
    """Error of stored states after so many tokens; see `state_error`."""
    kinds: list[tuple[Stored, int]] = [
        *(("float32", recent) for recent in (0, RECENT)),
        *(("bfloat16", recent) for recent in (0, RECENT)),
        ("halves", RECENT),
    ]

    def measure(stored: Stored, recent: int) -> dict[str, Any]:
        errors = step_errors(sorted(marks), stored, recent, str(device))
        return {"tokens": sorted(marks), "errors": errors}

    for stored, recent in kinds:
        key = {"stored": stored, "recent": recent, "last": max(marks)}
        yield key, partial(measure, stored, recent)
