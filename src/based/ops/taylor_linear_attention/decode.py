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

# Rows of the state in registers at a time, and warps, where there are few and many programs.
FEW, MANY = {"BLOCK_F": 32, "num_warps": 8}, {"BLOCK_F": 16, "num_warps": 4}
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
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q = q_ptr + row * q_stride + head * K
    k = k_ptr + row * k_stride + head * K
    column, lane = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_K)
    inside = column < V
    v = tl.load(v_ptr + row * v_stride + head * V + column, mask=inside, other=0.0)
    above, below = tl.zeros((BLOCK_V,), tl.float32), tl.zeros((), tl.float32)
    ring_k = ring_k_ptr + (row * RING * H + head) * K
    ring_v = ring_v_ptr + (row * RING * H + head) * V
    fold = RING == 0
    if RING > 0:
        place = tl.load(seen_ptr + row) % RING
        fold = place == RING - 1
        key = tl.load(k + lane, mask=lane < K, other=0.0)
        tl.store(ring_k + place * H * K + lane, key, mask=lane < K)
        tl.store(ring_v + place * H * V + column, v, mask=inside)
        # Threads of this program read what others of it have just written.
        tl.debug_barrier()
        query = tl.load(q + lane, mask=lane < K, other=0.0).to(tl.float32)
        for slot in range(place + 1):
            past = tl.load(ring_k + slot * H * K + lane, mask=lane < K, other=0.0)
            s = tl.sum(query * past.to(tl.float32)) * SCALE
            a = 1.0 + s + 0.5 * s * s
            value = tl.load(ring_v + slot * H * V + column, mask=inside, other=0.0)
            above += a * value.to(tl.float32)
            below += a
    numerator = numerator_ptr + (row * H + head) * F * V
    denominator = denominator_ptr + (row * H + head) * F
    # Summed over the rows of the tile once, at the end.
    tile_above = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    tile_below = tl.zeros((BLOCK_F,), tl.float32)
    for first in range(0, F, BLOCK_F):
        feature = first + tl.arange(0, BLOCK_F)
        real = feature < F
        cell = feature[:, None] * V + column[None, :]
        present = real[:, None] & inside[None, :]
        S = tl.load(numerator + cell, mask=present, other=0.0).to(tl.float32)
        z = tl.load(denominator + feature, mask=real, other=0.0).to(tl.float32)
        safe = tl.where(real, feature, 0)
        phi_q = tl.where(real, _feature(q, safe, K) * _weight(safe, K, SCALE), 0.0)
        if RING > 0:
            tile_above += phi_q[:, None] * S
            tile_below += phi_q * z
        if fold:
            if RING > 0:
                for age in range(RING):
                    phi_k = _feature(ring_k + age * H * K, safe, K)
                    folded = tl.load(ring_v + age * H * V + column, mask=inside, other=0.0)
                    S += phi_k[:, None] * folded.to(tl.float32)[None, :]
                    z += phi_k
            else:
                phi_k = _feature(k, safe, K)
                S += phi_k[:, None] * v.to(tl.float32)[None, :]
                z += phi_k
            tl.store(numerator + cell, S, mask=present)
            tl.store(denominator + feature, z, mask=real)
        if RING == 0:
            tile_above += phi_q[:, None] * S
            tile_below += phi_q * z
    above += tl.sum(tile_above, axis=0)
    below += tl.sum(tile_below)
    tl.store(out_ptr + (row * H + head) * V + column, above / below, mask=inside)


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
        RING=0 if recent_keys is None else recent_keys.shape[1],
        BLOCK_K=triton.next_power_of_2(K),
        BLOCK_V=triton.next_power_of_2(V),
        **(MANY if B * H >= PROGRAMS else FEW),
    )
    return out
