"""Runs the kernels: which tiles, and what they are given."""

from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from based.ops.kernels import products_of
from based.ops.packed import once_a_batch, sequence_ids
from based.ops.sliding_window_attention.kernels.gradients import (
    window_key_gradients,
    window_query_gradients,
)
from based.ops.sliding_window_attention.kernels.outputs import window_outputs


class Tiles(NamedTuple):
    """Tiles, warps and stages of each kernel; few, and each one is tested."""

    attend: dict[str, int]
    query_gradients: dict[str, int]
    key_gradients: dict[str, int]


def _tiles(D: int, wide: bool) -> Tiles:
    if wide or D > 128:
        # float32 operands, or heads twice as wide, fill the shared memory sooner.
        small = {"BQ": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
        return Tiles(small, small, small)
    # Narrow tiles leave registers for the sums, of 64 x D each.
    queries = {"BQ": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
    keys = {"BQ": 32, "BK": 64, "num_warps": 4, "num_stages": 3}
    if D <= 64:
        # Four programs a multiprocessor.
        keys = {**keys, "num_stages": 2, "maxnreg": 128}
    return Tiles(queries, queries, keys)


class Call(NamedTuple):
    """What all kernels of one call take, after their tensors."""

    constants: dict[str, Any]
    tiles: Tiles
    window: int
    edges: Int[Tensor, "2 S"]
    past: Int[Tensor, " B"]

    @staticmethod
    def of(q: Tensor, k: Tensor, window: int, past: Tensor | None, cu: Tensor | None) -> "Call":
        """Made without waiting for the device."""
        (T, _, D), S = q.shape[1:], k.shape[1]
        window, wide = min(window, S), q.dtype == torch.float32
        unused = q.new_empty(0, dtype=torch.int32)
        constants = {
            "PACKED": cu is not None,
            "PAST": past is not None and S > T,
            "D": D,
            "BD": max(16, triton.next_power_of_2(D)),
            "SCALE": D**-0.5,
            "PRECISION": products_of(q.dtype),
        }
        edges = unused if cu is None else edges_of(cu, T)
        past = unused if past is None else past.contiguous()
        return Call(constants, _tiles(D, wide), window, edges, past)

    def options(self, tiles: dict[str, int]) -> dict[str, Any]:
        """A kernel's constants: masks are left out of inner tiles where there are several."""
        wide = self.window > 4 * max(tiles["BQ"], tiles["BK"])
        return {**self.constants, **tiles, "WIDE": wide}


@once_a_batch
def edges_of(cu_seqlens: Int[Tensor, " E"], length: int) -> Int[Tensor, "2 T"]:
    """Where each token's sequence begins and ends, int32."""
    ids, ends = sequence_ids(cu_seqlens, length), F.pad(cu_seqlens[1:], (0, 1), value=length)
    return torch.stack([cu_seqlens[ids], ends[ids]]).to(torch.int32)


def dense(x: Tensor) -> Tensor:
    """With channels beside each other; copied only if they are not."""
    return x if x.stride(3) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of rows, tokens and heads."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def forward(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S H D"],
    v: Float[Tensor, "B S H D"],
    window: int,
    past: Int[Tensor, " B"] | None,
    cu_seqlens: Int[Tensor, " E"] | None,
) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B H T"]]:
    """Outputs, and log2 of each query's sum of exponentials, float32."""
    (B, T, H, _), S = q.shape, k.shape[1]
    call = Call.of(q, k, window, past, cu_seqlens)
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)
    q, k, v = dense(q), dense(k), dense(v)
    options = call.options(call.tiles.attend)
    window_outputs[H, triton.cdiv(T, options["BQ"]), B](
        *(q, k, v, out, lse, call.edges, call.past),
        *strides(q, k, v),
        *(T, S, H, call.window),
        **options,
    )
    return out, lse


def backward(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S H D"],
    v: Float[Tensor, "B S H D"],
    window: int,
    past: Int[Tensor, " B"] | None,
    cu_seqlens: Int[Tensor, " E"] | None,
    out: Float[Tensor, "B T H D"],
    lse: Float[Tensor, "B H T"],
    d_out: Float[Tensor, "B T H D"],
) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B S H D"], Float[Tensor, "B S H D"]]:
    """Gradients of q, k and v, given `forward`'s results."""
    (B, T, H, _), S = q.shape, k.shape[1]
    call = Call.of(q, k, window, past, cu_seqlens)
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    q, k, v, d_out = dense(q), dense(k), dense(v), dense(d_out)
    shared = (*strides(q, k, v, d_out), T, S, H, call.window)
    options = call.options(call.tiles.query_gradients)
    window_query_gradients[H, triton.cdiv(T, options["BQ"]), B](
        *(q, k, v, out, d_out, lse, delta, d_q, call.edges, call.past), *shared, **options
    )
    options = call.options(call.tiles.key_gradients)
    window_key_gradients[H, triton.cdiv(S, options["BK"]), B](
        *(q, k, v, d_out, lse, delta, d_k, d_v, call.edges, call.past), *shared, **options
    )
    return d_q, d_k, d_v
