"""Full rings of recent keys and values, added to their states.

Where heads are many, this is a kernel of its own, whose programs share the tiles of all full
rings; where they are few, `decode.py` folds in the program that has read a head's state.
"""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int16, Int32
from torch import Tensor

from based.ops.kernels import overlap
from based.ops.overlap import wait_for_previous
from based.ops.tensor_core import dot, dot_add

# Features of a state that are folded at a time, and values of each; programs that share the work,
# of up to so many rows.
TILE_FEATURES, TILE_VALUES, LAUNCH = 32, 64, {"num_warps": 1}
PROGRAMS, MOST_ROWS = 1056, 256
# Of everything in a matrix product.
SMALLEST = 16


@triton.jit
@no_type_check
def feature_of(x, feature, K: tl.constexpr):
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
def memory_of(
    numerator,
    denominator,
    ring_k,
    ring_v,
    row,
    head,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    RING: tl.constexpr,
):
    """Where a head's numerator (or its halves), denominator, recent keys and values begin."""
    HALVES: tl.constexpr = 2 if numerator.dtype.element_ty == tl.int16 else 1
    base, recent = row * H + head, row * RING * H + head
    S, z = numerator + base * HALVES * F * V, denominator + base * F
    return S, z, ring_k + recent * K, ring_v + recent * V


@triton.jit
@no_type_check
def _joined(upper, lower, present):
    """float32 numbers whose upper and lower 16 bits are stored apart."""
    high = tl.load(upper, mask=present, other=0).to(tl.int32) << 16
    low = tl.load(lower, mask=present, other=0).to(tl.int32) & 0xFFFF
    return (high | low).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _store_apart(upper, lower, S, present):
    bits = S.to(tl.int32, bitcast=True)
    tl.store(upper, (bits >> 16).to(tl.int16), mask=present)
    tl.store(lower, bits.to(tl.int16), mask=present)


@triton.jit
@no_type_check
def fold_ring(
    numerator,
    denominator,
    keys,
    values,
    first,
    column,
    counts,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds a head's full ring to some columns of BLOCK_F features of its state.

    These begin at number `first`; their share of the denominator is added where it `counts`.
    """
    feature, token = first + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_R)
    real, held, inside = feature < F, token < RING, column < V
    safe = tl.where(real, feature, 0)
    S, z = numerator + feature[:, None] * V + column[None, :], denominator + feature
    present = real[:, None] & inside[None, :]
    # The state is on its way before what is added to it is made.
    if numerator.dtype.element_ty == tl.int16:
        before = _joined(S, S + F * V, present)
    else:
        before = tl.load(S, mask=present, other=0.0).to(tl.float32)
    norm = tl.load(z, mask=real, other=0.0).to(tl.float32)
    phi = feature_of(keys + tl.where(held, token, 0)[None, :] * H * K, safe[:, None], K)
    phi = tl.where(held[None, :], phi, 0.0)
    cell = values + token[:, None] * H * V + column[None, :]
    v = tl.load(cell, mask=held[:, None] & inside[None, :], other=0.0)
    if values.dtype.element_ty == tl.bfloat16:
        # A product of two bfloat16 numbers is a sum of two, exactly.
        high = phi.to(tl.bfloat16)
        low = (phi - high.to(tl.float32)).to(tl.bfloat16)
        after = before + dot_add(low, v, dot(high, v, "tf32"), "tf32")
    else:
        after = before + dot(phi, v.to(tl.float32), "tf32x3")
    if numerator.dtype.element_ty == tl.int16:
        _store_apart(S, S + F * V, after, present)
    else:
        tl.store(S, after, mask=present)
    tl.store(z, norm + tl.sum(phi, axis=1), mask=real & counts)


@triton.jit
@no_type_check
def _fold_kernel(
    numerator_ptr,
    denominator_ptr,
    ring_k_ptr,
    ring_v_ptr,
    place_ptr,
    rows,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Adds full rings to their states: programs share the tiles of those of some rows."""
    PARTS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    TILES: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F * PARTS
    index = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    wait_for_previous(OVERLAP)
    full = tl.load(place_ptr + index, mask=index < rows, other=0) == RING - 1
    order = tl.where(full, tl.cumsum(full.to(tl.int32), 0), 0)
    items = tl.sum(full.to(tl.int32)) * (H * TILES)
    # Loading ahead costs the registers that other programs would have.
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), num_stages=1):
        head, tile = item // TILES % H, item % TILES
        row = tl.sum(tl.where(order == item // (H * TILES) + 1, index, 0)).to(tl.int64)
        S, z, keys, values = memory_of(
            *(numerator_ptr, denominator_ptr, ring_k_ptr, ring_v_ptr, row, head, H, K, V, F, RING)
        )
        part, first = tile % PARTS, tile // PARTS * BLOCK_F
        column = part * BLOCK_V + tl.arange(0, BLOCK_V)
        fold_ring(
            *(S, z, keys, values, first, column, part == 0, H, K, V, F, RING, BLOCK_F, BLOCK_R)
        )


def padded(length: int) -> int:
    """A power of two for an axis of a product."""
    return max(SMALLEST, 1 << max(0, length - 1).bit_length())


def fold_full_rings(
    numerator: Float[Tensor, "B H F V"] | Int16[Tensor, "B H 2 F V"],
    denominator: Float[Tensor, "B H F"],
    recent_keys: Float[Tensor, "B R H K"],
    recent_values: Float[Tensor, "B R H V"],
    places: Int32[Tensor, " B"],
) -> None:
    """Adds rings whose newest token took the last place to their rows' states, in place."""
    (B, H, F), V, K = denominator.shape, recent_values.shape[3], recent_keys.shape[3]
    width = min(TILE_VALUES, padded(V))
    items = B * H * triton.cdiv(F, TILE_FEATURES) * triton.cdiv(V, width)
    _fold_kernel[(min(items, PROGRAMS), triton.cdiv(B, MOST_ROWS))](
        numerator,
        denominator,
        recent_keys,
        recent_values,
        places,
        B,
        H=H,
        K=K,
        V=V,
        F=F,
        RING=recent_keys.shape[1],
        BLOCK_F=TILE_FEATURES,
        BLOCK_V=width,
        BLOCK_R=padded(recent_keys.shape[1]),
        BLOCK_B=min(MOST_ROWS, triton.next_power_of_2(B)),
        **overlap(places),
        **LAUNCH,
    )
