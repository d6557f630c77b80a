"""One token as one pass over the packed state: update, read-out and normalisation together.

One program holds a sequence's head. It streams the state's rows through registers
in float32, whatever the state is stored in. With a ring of recent keys and values
(the deferred step) the state is only read, and the ring is added as the exact
quadratic form, except at the token that fills the ring: that pass also folds the
ring into the state. Each sequence fills its ring in its own time, so that every
step of a batch is the same launch.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.kernels import overlap
from based.ops.overlap import wait_for_previous

# Rows of the state in registers at a time, and warps, where there are few and many programs.
FEW = {"BLOCK_F": 32, "STAGES": 3, "num_warps": 8}
MANY = {"BLOCK_F": 16, "STAGES": 4, "num_warps": 4}
PROGRAMS = 512


@triton.jit
@no_type_check
def _feature(x, feature, K: tl.constexpr):
    """Monomials number `feature` of the K inputs at `x`, in the order of `features.py`."""
    product = feature - 1 - K
    left = tl.where(product >= 0, product % K, tl.maximum(feature - 1, 0))
    right = (product % K + product // K) % K
    first = tl.load(x + left).to(tl.float32)
    second = tl.load(x + tl.where(product >= 0, right, 0)).to(tl.float32)
    value = tl.where(product >= 0, first * second, first)
    return tl.where(feature == 0, 1.0, value)


@triton.jit
@no_type_check
def _weight(feature, K: tl.constexpr, SCALE: tl.constexpr):
    """The Taylor weights on the query's side: 1, 1/sqrt(K), 1/(2K) for squares, 1/K."""
    weight = tl.where(feature <= 2 * K, 0.5 * SCALE * SCALE, SCALE * SCALE)
    return tl.where(feature == 0, 1.0, tl.where(feature <= K, SCALE, weight))


@triton.jit
@no_type_check
def _stream(
    q,
    keys,
    values,
    numerator,
    denominator,
    column,
    token,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds COUNT keys and values to the state, and reads the query's output and its divisor."""
    inside = column < V
    # Summed over the rows of the tile once, at the end.
    above = tl.zeros((BLOCK_F, column.shape[0]), tl.float32)
    below = tl.zeros((BLOCK_F,), tl.float32)
    # Several tiles are on their way at a time.
    for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        feature = first + tl.arange(0, BLOCK_F)
        real = feature < F
        cell = feature[:, None] * V + column[None, :]
        present = real[:, None] & inside[None, :]
        S = tl.load(numerator + cell, mask=present, other=0.0).to(tl.float32)
        z = tl.load(denominator + feature, mask=real, other=0.0).to(tl.float32)
        safe = tl.where(real, feature, 0)
        if COUNT > 0:
            held = tl.where(token < COUNT, token, 0)
            phi_k = _feature(keys + held[None, :] * H * K, safe[:, None], K)
            phi_k = tl.where((token < COUNT)[None, :], phi_k, 0.0)
            if COUNT == 1:
                S += phi_k * values
            else:
                S += tl.dot(phi_k, values, input_precision="ieee")
            z += tl.sum(phi_k, axis=1)
            tl.store(numerator + cell, S, mask=present)
            tl.store(denominator + feature, z, mask=real)
        phi_q = tl.where(real, _feature(q, safe, K) * _weight(safe, K, SCALE), 0.0)
        above += phi_q[:, None] * S
        below += phi_q * z
    return tl.sum(above, axis=0), tl.sum(below)


@triton.jit
@no_type_check
def _taylor_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    numerator_ptr,
    denominator_ptr,
    ring_k_ptr,
    ring_v_ptr,
    seen_ptr,
    out_ptr,
    q_stride,
    k_stride,
    v_stride,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q = q_ptr + row * q_stride + head * K
    k = k_ptr + row * k_stride + head * K
    v = v_ptr + row * v_stride + head * V
    column, lane, token = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    S = numerator_ptr + (row * H + head) * F * V
    z = denominator_ptr + (row * H + head) * F
    wait_for_previous(OVERLAP)
    value = tl.load(v + column, mask=column < V, other=0.0)
    if RING == 0:
        values = value.to(tl.float32)[None, :]
        above, below = _stream(
            q, k, values, S, z, column, token, SCALE, H, K, V, F, 1, BLOCK_F, STAGES
        )
    else:
        place = (tl.load(seen_ptr + row) % RING).to(tl.int32)
        keys = ring_k_ptr + (row * RING * H + head) * K
        key = tl.load(k + lane, mask=lane < K, other=0.0)
        tl.store(keys + place * H * K + lane, key, mask=lane < K)
        cell = (row * RING * H + head) * V + token[:, None] * H * V + column[None, :]
        older = (token < place)[:, None] & (column < V)[None, :]
        values = tl.load(ring_v_ptr + cell, mask=older, other=0.0)
        newest = (token == place)[:, None]
        values = tl.where(newest, value[None, :], values)
        tl.store(ring_v_ptr + cell, values, mask=newest & (column < V)[None, :])
        values = values.to(tl.float32)
        # Threads of this program read what others of it have just written.
        tl.debug_barrier()
        if place == RING - 1:
            above, below = _stream(
                q, keys, values, S, z, column, token, SCALE, H, K, V, F, RING, BLOCK_F, STAGES
            )
        else:
            seen = (token <= place)[:, None] & (lane < K)[None, :]
            past = tl.load(keys + token[:, None] * H * K + lane[None, :], mask=seen, other=0.0)
            query = tl.load(q + lane, mask=lane < K, other=0.0).to(tl.float32)
            s = tl.sum(query[None, :] * past.to(tl.float32), axis=1) * SCALE
            a = tl.where(token <= place, 1.0 + s + 0.5 * s * s, 0.0)
            above, below = _stream(
                q, keys, values, S, z, column, token, SCALE, H, K, V, F, 0, BLOCK_F, STAGES
            )
            above += tl.sum(a[:, None] * values, axis=0)
            below += tl.sum(a)
    tl.store(out_ptr + (row * H + head) * V + column, above / below, mask=column < V)


def taylor_step_kernel(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    numerator: Float[Tensor, "B H F V"],
    denominator: Float[Tensor, "B H F"],
    recent_keys: Float[Tensor, "B R H K"] | None = None,
    recent_values: Float[Tensor, "B R H V"] | None = None,
    seen: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B H V"]:
    """The step of `step.py`, or with a ring its deferred step; changes the state in place.

    q, k and v may be slices of a projection (heads contiguous); the state is
    contiguous, its numerator float32 or bfloat16. `seen` is not advanced.
    """
    (B, H, K), V, F = q.shape, v.shape[2], numerator.shape[2]
    out = torch.empty((B, H, V), dtype=v.dtype, device=v.device)
    ring = 0 if recent_keys is None else recent_keys.shape[1]
    _taylor_step_kernel[(B, H)](
        q,
        k,
        v,
        numerator,
        denominator,
        # Without a ring these are not read.
        k if recent_keys is None else recent_keys,
        v if recent_values is None else recent_values,
        k if seen is None else seen,
        out,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        SCALE=K**-0.5,
        H=H,
        K=K,
        V=V,
        F=F,
        RING=ring,
        BLOCK_K=triton.next_power_of_2(K),
        BLOCK_V=triton.next_power_of_2(V),
        # A matrix product has at least 16 of everything.
        BLOCK_R=max(16, triton.next_power_of_2(ring)) if ring else 1,
        **overlap(q),
        **(MANY if B * H >= PROGRAMS else FEW),
    )
    return out
