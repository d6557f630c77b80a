"""One token as one pass over the packed state: update, read-out and normalisation together.

A program streams a head's state through registers in float32, whatever it is stored in:
of a numerator in halves (`halves.py`) the upper ones, all but when it folds.
With a ring of recent keys and values (the deferred step) the state is only read, and the
ring is added as the exact quadratic form. A ring that is full is folded into its state:
where heads are few by the program that has read the state, whose end is all that the next
kernel waits for; where they are many by a second kernel (`fold.py`), since registers of the
first decide how many programs share a multiprocessor. In a step that runs beside what follows,
by when tokens seen are counted: so the first kernel writes down which places it has filled. Each
sequence fills its ring in its own time, so that every step of a batch is the same launches.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int16
from torch import Tensor

from based.ops.kernels import aside, overlap
from based.ops.overlap import let_next_start, only_wait
from based.ops.taylor_linear_attention.fold import (
    TILE_FEATURES,
    feature_of,
    fold_full_rings,
    fold_ring,
    memory_of,
    padded,
)

# Where a state is written every token; where it is read by many programs, whole or of its halves
# one, and by few, each of which has so many numbers in flight. 132 multiprocessors were measured.
WRITE = {"BLOCK_F": 16, "STAGES": 4, "num_warps": 4}
READ_MANY, MOST_VALUES = {"BLOCK_F": 16, "STAGES": 3, "num_warps": 2}, 128
READ_HALF = {"BLOCK_F": 32, "STAGES": 3, "num_warps": 1}
READ_FEW, IN_FLIGHT = {"STAGES": 0, "num_warps": 8}, 32768
MANY = 256


@triton.jit
@no_type_check
def _weight(feature, K: tl.constexpr, SCALE: tl.constexpr):
    """The Taylor weights on the query's side: 1, 1/sqrt(K), 1/(2K) for squares, 1/K."""
    weight = tl.where(feature <= 2 * K, 0.5 * SCALE * SCALE, SCALE * SCALE)
    return tl.where(feature == 0, 1.0, tl.where(feature <= K, SCALE, weight))


@triton.jit
@no_type_check
def _query_features(
    q, first, K: tl.constexpr, SCALE: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr
):
    """The query's weighted features from number `first` on."""
    feature = first + tl.arange(0, BLOCK_F)
    safe = tl.where(feature < F, feature, 0)
    return tl.where(feature < F, feature_of(q, safe, K) * _weight(safe, K, SCALE), 0.0)


@triton.jit
@no_type_check
def _features_of_state(
    numerator,
    denominator,
    first,
    column,
    V: tl.constexpr,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """BLOCK_F features of a head's state from number `first` on, as they are stored.

    Of a numerator in halves, the upper ones.
    """
    feature = first + tl.arange(0, BLOCK_F)
    real, cell = feature < F, feature[:, None] * V + column[None, :]
    S = tl.load(numerator + cell, mask=real[:, None] & (column < V)[None, :], other=0.0)
    return S, tl.load(denominator + feature, mask=real, other=0.0)


@triton.jit
@no_type_check
def _number(S):
    """float32 of what is stored: of an upper half, the middle of the numbers that have it."""
    if S.dtype == tl.int16:
        return ((S.to(tl.int32) << 16) | 0x8000).to(tl.float32, bitcast=True)
    return S.to(tl.float32)


@triton.jit
@no_type_check
def _stream(
    q,
    k,
    value,
    numerator,
    denominator,
    column,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The query's output and its divisor from the state, to which WRITE adds a key first.

    Where it is only read, the first tiles are on their way before the query is waited for.
    """
    # Summed over the rows of the tile once, at the end.
    above = tl.zeros((BLOCK_F, column.shape[0]), tl.float32)
    below = tl.zeros((BLOCK_F,), tl.float32)
    # Several tiles are on their way at a time.
    for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        S, z = _features_of_state(numerator, denominator, first, column, V, F, BLOCK_F)
        if not WRITE:
            only_wait(OVERLAP)
        S, z = _number(S), z.to(tl.float32)
        if WRITE:
            feature = first + tl.arange(0, BLOCK_F)
            real = feature < F
            phi_k = feature_of(k, tl.where(real, feature, 0), K)
            S += phi_k[:, None] * value[None, :]
            z += phi_k
            cell = feature[:, None] * V + column[None, :]
            tl.store(numerator + cell, S, mask=real[:, None] & (column < V)[None, :])
            tl.store(denominator + feature, z, mask=real)
        phi_q = _query_features(q, first, K, SCALE, F, BLOCK_F)
        above += phi_q[:, None] * S
        below += phi_q * z
    return tl.sum(above, axis=0), tl.sum(below)


@triton.jit
@no_type_check
def _read(
    q,
    S,
    z,
    numerator,
    denominator,
    column,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The query's output and its divisor from the state, whose first features are S and z."""
    above, below = tl.zeros((column.shape[0],), tl.float32), 0.0
    for first in tl.static_range(0, F, BLOCK_F):
        phi_q = _query_features(q, first, K, SCALE, F, BLOCK_F)
        above += tl.sum(phi_q[:, None] * _number(S), axis=0)
        below += tl.sum(phi_q * z.to(tl.float32))
        if first + BLOCK_F < F:
            next = first + BLOCK_F
            S, z = _features_of_state(numerator, denominator, next, column, V, F, BLOCK_F)
    return above, below


@triton.jit
@no_type_check
def _recent(
    keys,
    values,
    place,
    lane,
    column,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Which slots of a head's ring hold tokens before the newest, their keys and values."""
    token = tl.arange(0, BLOCK_R)
    older = token < place
    cell = keys + token[:, None] * H * K + lane[None, :]
    past = tl.load(cell, mask=older[:, None] & (lane < K)[None, :], other=0.0)
    cell = values + token[:, None] * H * V + column[None, :]
    kept = tl.load(cell, mask=older[:, None] & (column < V)[None, :], other=0.0)
    return older, past.to(tl.float32), kept.to(tl.float32)


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
    place_ptr,
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
    APART: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """With FOLDED features at a time, a program folds the ring that it has filled.

    APART from it, that is done by whoever reads the places of the newest tokens.
    Without STAGES the state is on its way before the kernel waits.
    """
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    q = q_ptr + row * q_stride + head * K
    k = k_ptr + row * k_stride + head * K
    column, lane = part * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_K)
    inside, held = column < V, lane < K
    S, z, keys, values = memory_of(
        *(numerator_ptr, denominator_ptr, ring_k_ptr, ring_v_ptr, row, head, H, K, V, F, RING)
    )
    let_next_start(OVERLAP)
    if RING == 0:
        only_wait(OVERLAP)
        value = tl.load(v_ptr + row * v_stride + head * V + column, mask=inside, other=0.0)
        value = value.to(tl.float32)
        above, below = _stream(
            *(q, k, value, S, z, column, SCALE, K, V, F), True, BLOCK_F, STAGES, OVERLAP
        )
    else:
        place = (tl.load(seen_ptr + row) % RING).to(tl.int32)
        if STAGES == 0:
            older, past, kept = _recent(keys, values, place, lane, column, H, K, V, BLOCK_R)
            state, norm = _features_of_state(S, z, 0, column, V, F, BLOCK_F)
            only_wait(OVERLAP)
        else:
            above, below = _stream(
                *(q, k, 0.0, S, z, column, SCALE, K, V, F), False, BLOCK_F, STAGES, OVERLAP
            )
            older, past, kept = _recent(keys, values, place, lane, column, H, K, V, BLOCK_R)
        newest = tl.load(v_ptr + row * v_stride + head * V + column, mask=inside, other=0.0)
        query = tl.load(q + lane, mask=held, other=0.0).to(tl.float32)
        key = tl.load(k + lane, mask=held, other=0.0)
        tl.store(values + place * H * V + column, newest, mask=inside)
        if part == 0:
            tl.store(keys + place * H * K + lane, key, mask=held)
        if APART:
            tl.store(place_ptr + row, place, mask=(head == 0) & (part == 0))
        s = tl.sum(query[None, :] * past, axis=1) * SCALE
        a = tl.where(older, 1.0 + s + 0.5 * s * s, 0.0)
        s = tl.sum(query * key.to(tl.float32)) * SCALE
        own = 1.0 + s + 0.5 * s * s
        near = tl.sum(a[:, None] * kept, axis=0) + own * newest.to(tl.float32)
        near_below = tl.sum(a) + own
        if STAGES == 0:
            above, below = _read(q, state, norm, S, z, column, SCALE, K, V, F, BLOCK_F)
        above += near
        below += near_below
    tl.store(out_ptr + (row * H + head) * V + column, above / below, mask=inside)
    if FOLDED > 0:  # noqa: SIM102 (what is known when compiled, and what is not)
        if place == RING - 1:
            # The newest key and value were stored by other threads than now read them.
            tl.debug_barrier()
            for first in range(0, F, FOLDED):
                fold_ring(
                    S, z, keys, values, first, column, True, H, K, V, F, RING, FOLDED, BLOCK_R
                )


def taylor_step_kernel(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    numerator: Float[Tensor, "B H F V"] | Int16[Tensor, "B H 2 F V"],
    denominator: Float[Tensor, "B H F"],
    recent_keys: Float[Tensor, "B R H K"] | None = None,
    recent_values: Float[Tensor, "B R H V"] | None = None,
    seen: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B H V"]:
    """The step of `step.py`, or with a ring its deferred step; changes the state in place.

    q, k and v may be slices of a projection (heads contiguous); the state is
    contiguous, its numerator float32 or bfloat16, or with a ring in halves. `seen` is not
    advanced.
    """
    (B, H, K), V, F = q.shape, v.shape[2], numerator.shape[-2]
    out = torch.empty((B, H, V), dtype=v.dtype, device=v.device)
    ring = 0 if recent_keys is None else recent_keys.shape[1]
    whole = triton.next_power_of_2(V)
    wide, long = padded(V), padded(ring)
    apart = ring > 0 and B * H >= MANY
    sizes = {"H": H, "K": K, "V": V, "F": F, "RING": ring, "APART": apart}
    places = torch.empty(B, dtype=torch.int32, device=q.device) if apart else None
    if not ring:
        tiles = {**WRITE, "BLOCK_V": whole, "BLOCK_R": 1, "FOLDED": 0}
    elif apart:
        tiles = READ_HALF if numerator.dtype == torch.int16 else READ_MANY
        tiles = {**tiles, "BLOCK_V": min(MOST_VALUES, whole), "BLOCK_R": long, "FOLDED": 0}
    else:
        features = min(triton.next_power_of_2(F), IN_FLIGHT // wide)
        tiles = {**READ_FEW, "BLOCK_F": features, "BLOCK_V": wide}
        tiles |= {"BLOCK_R": long, "FOLDED": TILE_FEATURES}
    _taylor_step_kernel[(B, H, triton.cdiv(V, tiles["BLOCK_V"]))](
        q,
        k,
        v,
        numerator,
        denominator,
        # Without a ring, or a fold apart, these are not touched.
        k if recent_keys is None else recent_keys,
        v if recent_values is None else recent_values,
        k if seen is None else seen,
        k if places is None else places,
        out,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        SCALE=K**-0.5,
        BLOCK_K=triton.next_power_of_2(K),
        **sizes,
        **overlap(q, reads_state=ring > 0),
        **tiles,
    )
    if places is not None:
        with aside(places):
            fold_full_rings(numerator, denominator, recent_keys, recent_values, places)
    return out
