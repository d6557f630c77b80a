"""Runs the kernels: which tiles, in which order, with which intermediate tensors."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.taylor_linear_attention.features import num_features
from based.ops.taylor_linear_attention.kernels.gradients import (
    key_gradients,
    query_gradients,
    sum_deltas,
)
from based.ops.taylor_linear_attention.kernels.outputs import attend
from based.ops.taylor_linear_attention.kernels.segments import Segments, divide, divide_evenly
from based.ops.taylor_linear_attention.kernels.states import carry_states, sum_states

# Tiles, warps and stages of each kernel.
STATES = {"C": 64, "num_warps": 8, "num_stages": 3}
ATTEND = {"BQ": 64, "BK": 64, "num_warps": 4, "num_stages": 2}
QUERY_GRADIENTS = {"BF": 128, "BQ": 64, "BK": 64, "num_warps": 4, "num_stages": 2}
KEY_GRADIENTS = {"BF": 128, "BQ": 64, "BK": 64, "num_warps": 4, "num_stages": 2}
# Enough programs to fill the largest GPUs, where one walks a strip of segments.
PROGRAMS = 256


class States(NamedTuple):
    """Sums before (or after) segments: within their strip, and of what lies beyond it."""

    numerator: Float[Tensor, "M H F V"]
    normaliser: Float[Tensor, "M H F"]
    strip_numerator: Float[Tensor, "S H F V"]
    strip_normaliser: Float[Tensor, "S H F"]


class Shape(NamedTuple):
    """Sizes and tiles of one call."""

    heads: int
    K: int
    V: int
    dtype: torch.dtype

    @property
    def constants(self) -> dict:
        """What all kernels take."""
        K, wide = self.K, self.dtype == torch.float32
        return {
            "K": K,
            "KP": max(16, triton.next_power_of_2(K)),
            "V": self.V,
            "F": num_features(K),
            "BF": min(128, triton.next_power_of_2(K * K // 2)),
            "BR": max(64, triton.next_power_of_2(1 + K + K // 2)),
            "SCALE": K**-0.5,
            "PRECISION": "tf32x3" if wide else "tf32",
        }

    @property
    def triton_dtype(self) -> tl.dtype:
        return tl.float32 if self.dtype == torch.float32 else tl.bfloat16


def shape_of(q: Tensor, v: Tensor) -> Shape:
    """float16 is computed in bfloat16: sums of products of keys would overflow it."""
    dtype = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    return Shape(q.shape[2], q.shape[3], v.shape[3], dtype)


def segments_of(
    q: Float[Tensor, "B T H K"], cu_seqlens: Int[Tensor, " E"] | None, length: int
) -> Segments:
    """The batch's tables; strips are as long as leaves enough of them."""
    B, T, H, _ = q.shape
    per_strip = max(1, B * T * H // (length * PROGRAMS))
    if cu_seqlens is None:
        return divide_evenly(B, T, length, per_strip, q.device)
    N = len(cu_seqlens) - 1
    return divide(cu_seqlens, T // length + N, T // (length * per_strip) + N, length, per_strip)


def strips_follow(segments: Segments) -> bool:
    """Whether a sequence can have more than one strip."""
    return len(segments.strips) > len(segments.strip_edges) - 1


def run_states(
    shape: Shape,
    segments: Segments,
    x: Tensor,
    y: Tensor,
    beyond: tuple[Tensor | None, Tensor | None],
    queries: tuple[Tensor, Tensor] | None = None,
) -> tuple[States, Tensor, Tensor]:
    """All states, and their totals by sequence; with `queries` (denominator, delta), gradients.

    `beyond` is what the running sum starts from: the initial state, or the
    gradient of the final one.
    """
    H, V, F = shape.heads, shape.V, num_features(shape.K)
    M, S, N = len(segments.segments), len(segments.strips), len(segments.strip_edges) - 1
    states = States(
        x.new_empty((M, H, F, V), dtype=shape.dtype),
        x.new_empty((M, H, F), dtype=torch.float32),
        x.new_empty((S, H, F, V), dtype=torch.float32),
        x.new_empty((S, H, F), dtype=torch.float32),
    )
    BV = min(128, max(16, triton.next_power_of_2(V)))
    constants = shape.constants | STATES
    tiles = triton.cdiv(shape.K**2 // 2, constants["BF"]) * triton.cdiv(V, BV)
    denominator, delta = queries or (states.normaliser, states.normaliser)
    sum_states[S, H, tiles](
        x,
        y,
        denominator,
        delta,
        segments.strips,
        *states,
        x.stride(1),
        x.stride(2),
        y.stride(1),
        y.stride(2),
        H,
        QUERIES=queries is not None,
        BV=BV,
        LENGTH=segments.length,
        **constants,
    )
    totals = []
    for part, start in zip(states[2:], beyond, strict=True):
        E = F * V if part.dim() == 4 else F
        total = x.new_empty((N, *part.shape[1:]), dtype=torch.float32)
        carry_states[N, H, triton.cdiv(E, 256)](
            part,
            total if start is None else start,
            total,
            segments.strip_edges,
            H,
            E,
            HAS_INITIAL=start is not None,
            REVERSE=queries is not None,
            BLOCK=256,
            GROUP=16,
        )
        totals.append(total)
    return states, totals[0], totals[1]


def flat(x: Float[Tensor, "B T H D"]) -> Float[Tensor, "1 T H D"]:
    """All tokens in one row, with channels beside each other; copied only if need be."""
    if x.stride(3) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        x = x.contiguous()
    return x.flatten(0, 1)[None]


def forward(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    numerator: Float[Tensor, "N H F V"] | None,
    denominator: Float[Tensor, "N H F"] | None,
    cu_seqlens: Int[Tensor, " E"] | None,
    length: int = 256,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Outputs, final state, the outputs' denominators [B, T, H], and the states before segments."""
    shape, segments = shape_of(q, v), segments_of(q, cu_seqlens, length)
    out, below = v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = flat(q), flat(k), flat(v)
    states, final, final_normaliser = run_states(shape, segments, k, v, (numerator, denominator))
    V, M = shape.V, len(segments.segments)
    BV = min(128, max(16, triton.next_power_of_2(V)))
    attend[M, shape.heads, triton.cdiv(V, BV)](
        q,
        k,
        v,
        out,
        below,
        segments.segments,
        *states,
        *(stride for x in (q, k, v) for stride in x.stride()[1:3]),
        shape.heads,
        HAS_STATE=numerator is not None or strips_follow(segments),
        BV=BV,
        LENGTH=length,
        DTYPE=shape.triton_dtype,
        **(shape.constants | ATTEND),
    )
    return out, final, final_normaliser, below, list(states)


def backward(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    cu_seqlens: Int[Tensor, " E"] | None,
    out: Float[Tensor, "B T H V"],
    below: Float[Tensor, "B T H"],
    states: list[Tensor],
    has_initial: bool,
    d_out: Float[Tensor, "B T H V"],
    d_numerator: Float[Tensor, "N H F V"] | None,
    d_denominator: Float[Tensor, "N H F"] | None,
    length: int = 256,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state."""
    shape, segments = shape_of(q, v), segments_of(q, cu_seqlens, length)
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(below)
    q, k, v, d_out = flat(q), flat(k), flat(v), flat(d_out)
    H, V, M, T = shape.heads, shape.V, len(segments.segments), q.shape[1]
    BV = max(16, triton.next_power_of_2(V))
    sum_deltas[triton.cdiv(T, 64), H](
        out,
        d_out,
        delta,
        d_out.stride(1),
        d_out.stride(2),
        T,
        H,
        V=V,
        BV=BV,
        BT=64,
    )
    beyond = (d_numerator, d_denominator)
    after, d_initial, d_initial_normaliser = run_states(
        shape, segments, q, d_out, beyond, (below, delta)
    )
    strides = [stride for x in (q, k, v, d_out) for stride in x.stride()[1:3]]
    follow = strips_follow(segments)
    common = {"BV": BV, "LENGTH": length, "DTYPE": shape.triton_dtype, **shape.constants}
    query_gradients[M, H](
        q,
        k,
        v,
        d_out,
        below,
        delta,
        d_q,
        segments.segments,
        *states,
        *strides,
        H,
        HAS_STATE=has_initial or follow,
        **(common | QUERY_GRADIENTS),
    )
    key_gradients[M, H](
        q,
        k,
        v,
        d_out,
        below,
        delta,
        d_k,
        d_v,
        segments.segments,
        *after,
        *strides,
        H,
        HAS_STATE=d_numerator is not None or follow,
        **(common | KEY_GRADIENTS),
    )
    return d_q, d_k, d_v, d_initial, d_initial_normaliser
