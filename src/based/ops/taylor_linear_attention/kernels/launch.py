"""Runs the kernels: which tiles, in which order, with which intermediate tensors."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.kernels import products_of
from based.ops.taylor_linear_attention.features import num_features
from based.ops.taylor_linear_attention.kernels import hopper
from based.ops.taylor_linear_attention.kernels.gradients import key_gradients, query_gradients
from based.ops.taylor_linear_attention.kernels.outputs import attend
from based.ops.taylor_linear_attention.kernels.segments import Segments, divide, divide_evenly
from based.ops.taylor_linear_attention.kernels.states import carry_states, sum_states

# Tokens of a segment.
LENGTH = 256
# Enough programs to fill the largest GPUs, where one walks a strip of segments.
PROGRAMS = 256
# Registers of a thread of `attend` where several tiles of features and narrow heads would take
# more, and a multiprocessor hold fewer programs.
BOUND: dict[str, int] = {"maxnreg": 128}


class States(NamedTuple):
    """Sums before (or after) segments: within their strip, and of what lies beyond it.

    A tensor without elements stands for sums that are not needed.
    """

    numerator: Float[Tensor, "M H F V"]
    normaliser: Float[Tensor, "M H F"]
    strip_numerator: Float[Tensor, "S H F V"]
    strip_normaliser: Float[Tensor, "S H F"]


class Tiles(NamedTuple):
    """Tiles, warps and stages of each kernel; few, and each one is tested."""

    states: dict[str, int]
    attend: dict[str, int]
    query_gradients: dict[str, int]
    key_gradients: dict[str, int]


def _tiles(K: int, V: int, wide: bool) -> Tiles:
    """docs/kernels.md says what each choice costs in registers and shared memory."""
    one = {"BV": 128, "num_warps": 4, "num_stages": 1}
    square, small = {"BF": 64, "BQ": 64, **one}, {"BF": 32, "BQ": 32, **one}
    # float32 operands, or heads twice as wide, fill shared memory and registers sooner.
    if wide or V > 128:
        states, attend = {"BF": 64, "C": 32, **one}, small
        gradients = {**small, "BK": 32, "BV": 256}
        if K <= 16 and wide:
            gradients |= {"BF": 16, "BQ": 16, "BK": 16}
        elif K <= 16:
            gradients |= {"BQ": 64, "BK": 64, "num_warps": 8}
        return Tiles(states, attend, gradients, gradients)
    states, attend, gradients = {"BF": 128, "C": 64, **one}, square, {**square, "BK": 64}
    if K > 16:
        # Several tiles make the loop of the states conditional, and Triton 3.6 pipelines that
        # wrongly: it stays at one stage.
        if V <= 64:
            attend = {**square, **BOUND}
    else:
        states |= {"num_stages": 3, "num_warps": 4 if V <= 64 else 8}
    return Tiles(states, attend, gradients, gradients)


class Shape(NamedTuple):
    """Sizes of one call, and the dtype of its products."""

    heads: int
    K: int
    V: int
    dtype: torch.dtype

    @staticmethod
    def of(q: Tensor, v: Tensor) -> "Shape":
        """float16 is computed in bfloat16: sums of products of keys would overflow it."""
        dtype = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
        return Shape(q.shape[2], q.shape[3], v.shape[3], dtype)

    @property
    def tiles(self) -> Tiles:
        """The kernels' configurations."""
        return _tiles(self.K, self.V, self.dtype == torch.float32)

    def constants(self, tiles: dict[str, int]) -> dict[str, Any]:
        """What all kernels take."""
        K, KP = self.K, max(16, triton.next_power_of_2(self.K))
        return {
            **tiles,
            "BF": min(tiles["BF"], triton.next_power_of_2(K // 2 * KP)),
            "BV": min(tiles["BV"], max(16, triton.next_power_of_2(self.V))),
            "K": K,
            "KP": KP,
            "V": self.V,
            "F": num_features(K),
            "SCALE": K**-0.5,
            "PRECISION": products_of(self.dtype),
        }

    @property
    def products(self) -> tl.dtype:
        """The dtype of products, as Triton names it."""
        return tl.float32 if self.dtype == torch.float32 else tl.bfloat16


def counts(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Segments (at most), strips (at most), and segments of a strip."""
    B, T, H, _ = q.shape
    per_strip = max(1, B * T * H // (LENGTH * PROGRAMS))
    if cu_seqlens is None:
        return B * -(-T // LENGTH), B * -(-T // (LENGTH * per_strip)), per_strip
    N = len(cu_seqlens) - 1
    return T // LENGTH + N, T // (LENGTH * per_strip) + N, per_strip


def segments_of(q: Float[Tensor, "B T H K"], cu_seqlens: Int[Tensor, " E"] | None) -> Segments:
    """The batch's tables; strips are as long as leaves enough of them."""
    num_segments, num_strips, per_strip = counts(q, cu_seqlens)
    if cu_seqlens is None:
        return divide_evenly(q.shape[0], q.shape[1], LENGTH, per_strip, q.device)
    return divide(cu_seqlens, num_segments, num_strips, LENGTH, per_strip)


def run_states(
    shape: Shape,
    segments: Segments,
    x: Float[Tensor, "1 BT H K"],
    y: Float[Tensor, "1 BT H V"],
    beyond: tuple[Tensor | None, Tensor | None],
    delta: Float[Tensor, "H BT"] | None = None,
) -> tuple[States, Tensor, Tensor]:
    """All states, and their totals by sequence; with `delta`, gradients.

    `beyond` is what the running sums start from: the initial state, or the
    gradient of the final one.
    """
    H, V, F = shape.heads, shape.V, num_features(shape.K)
    M, S, N = len(segments.segments), len(segments.strips), len(segments.strip_edges) - 1
    # Strips that a packed batch turns out not to have are still converted with the others.
    new_sums = x.new_zeros if segments.padded else x.new_empty
    states = States(
        x.new_empty((M, H, F, V), dtype=shape.dtype),
        x.new_empty((M, H, F), dtype=torch.float32),
        new_sums((S, H, F, V), dtype=torch.float32),
        x.new_empty((S, H, F), dtype=torch.float32),
    )
    if hopper.takes(x, y):
        hopper.sum_states(x, y, delta, segments.strips, states)
    else:
        constants = shape.constants(shape.tiles.states)
        features = shape.K // 2 * constants["KP"]
        tiles = triton.cdiv(features, constants["BF"]) * triton.cdiv(V, constants["BV"])
        sum_states[S * H, tiles](
            x,
            y,
            states.normaliser if delta is None else delta,
            segments.strips,
            *states,
            *x.stride()[1:3],
            *y.stride()[1:3],
            x.shape[1],
            H,
            QUERIES=delta is not None,
            LENGTH=LENGTH,
            **constants,
        )
    if beyond[0] is None and not segments.carried:
        # One strip a sequence and nothing beyond it: strips are the totals.
        return States(*states[:2], *nothing(x, 2)), states[2], states[3]
    totals = []
    for part, start in zip(states[2:], beyond, strict=True):
        E = F * V if part.dim() == 4 else F
        total = x.new_empty((N, *part.shape[1:]), dtype=torch.float32)
        carry_states[N, H, triton.cdiv(E, 256)](
            part,
            total if start is None else start.contiguous(),
            total,
            segments.strip_edges,
            H,
            E,
            HAS_INITIAL=start is not None,
            REVERSE=delta is not None,
            BLOCK=256,
            GROUP=16,
        )
        totals.append(total)
    return states, totals[0], totals[1]


def nothing(x: Tensor, count: int) -> list[Tensor]:
    """Tensors without elements."""
    return [x.new_empty(0, dtype=torch.float32) for _ in range(count)]


def flat(x: Float[Tensor, "B T H D"]) -> Float[Tensor, "1 BT H D"]:
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
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, States]:
    """Outputs, final state, 1 / the outputs' denominators [H, B T], and states before segments.

    The final state has no elements if it is not wanted and not needed.
    """
    shape, segments = Shape.of(q, v), segments_of(q, cu_seqlens)
    out = v.new_empty(v.shape)
    inverse = q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=torch.float32)
    states = States(q.new_empty(0, dtype=shape.dtype), *nothing(q, 3))
    final, final_normaliser = nothing(q, 2)
    q, k, v = flat(q), flat(k), flat(v)
    if want_state or numerator is not None or q.shape[1] > LENGTH * out.shape[0]:
        beyond = (numerator, denominator)
        states, final, final_normaliser = run_states(shape, segments, k, v, beyond)
    if hopper.takes(q, v, k):
        hopper.attend(q, k, v, out, inverse, segments.segments, states)
        return out, final, final_normaliser, inverse, states
    constants = shape.constants(shape.tiles.attend)
    attend[len(segments.segments) * shape.heads, triton.cdiv(shape.V, constants["BV"])](
        q,
        k,
        v,
        out,
        inverse,
        segments.segments,
        *states,
        *(stride for x in (q, k, v) for stride in x.stride()[1:3]),
        q.shape[1],
        shape.heads,
        HAS_STATE=states.strip_numerator.numel() > 0,
        DTYPE=shape.products,
        **constants,
    )
    return out, final, final_normaliser, inverse, states


def backward(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    cu_seqlens: Int[Tensor, " E"] | None,
    out: Float[Tensor, "B T H V"],
    inverse: Float[Tensor, "H BT"],
    states: States,
    d_out: Float[Tensor, "B T H V"],
    d_numerator: Float[Tensor, "N H F V"] | None,
    d_denominator: Float[Tensor, "N H F"] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state (without elements if there was none)."""
    shape, segments = Shape.of(q, v), segments_of(q, cu_seqlens)
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(inverse)
    q, k, v, d_out = flat(q), flat(k), flat(v), flat(d_out)
    g = v.new_empty(v.shape, dtype=shape.dtype)
    H, M, T = shape.heads, len(segments.segments), q.shape[1]
    strides = [stride for x in (q, k, v) for stride in x.stride()[1:3]]
    # Hopper's kernels, where they take these tensors, fill the same ones.
    fast = hopper.takes(q, v, k, d_out)
    if fast:
        results = g, delta, d_q, segments.segments
        hopper.query_gradients(q, k, v, out, d_out, inverse, *results, states)
    else:
        query_gradients[(M * H,)](
            q,
            k,
            v,
            out,
            d_out,
            inverse,
            g,
            delta,
            d_q,
            segments.segments,
            *states,
            *strides,
            *d_out.stride()[1:3],
            T,
            H,
            HAS_STATE=states.strip_numerator.numel() > 0,
            DTYPE=shape.products,
            **shape.constants(shape.tiles.query_gradients),
        )
    after = States(q.new_empty(0, dtype=shape.dtype), *nothing(q, 3))
    d_initial, d_initial_normaliser = nothing(q, 2)
    if states.numerator.numel() or d_numerator is not None:
        after, d_initial, d_initial_normaliser = run_states(
            shape, segments, q, g, (d_numerator, d_denominator), delta
        )
    if fast:
        hopper.key_gradients(q, k, v, g, delta, d_k, d_v, segments.segments, after)
    else:
        key_gradients[(M * H,)](
            q,
            k,
            v,
            g,
            delta,
            d_k,
            d_v,
            segments.segments,
            *after,
            *strides,
            T,
            H,
            HAS_STATE=after.strip_numerator.numel() > 0,
            DTYPE=shape.products,
            **shape.constants(shape.tiles.key_gradients),
        )
    return d_q, d_k, d_v, d_initial, d_initial_normaliser
