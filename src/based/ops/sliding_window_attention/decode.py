"""One query against a cache of rotated keys: rotary, cache write and attention in one pass.

The cache is a ring of S slots, token t in slot t mod S: a window's ring, or a
Transformer's cache that never comes round. A row reads only the slots it has
filled. Where rows and heads are few, the slots are split among programs, and a
second kernel joins the parts. Queries that share their keys are a matrix, and read
them once.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.kernels import overlap
from based.ops.overlap import let_next_start, only_wait, wait_for_previous
from based.ops.tensor_core import dot, dot_add

TILE = {"BLOCK_S": 16, "STAGES": 3, "num_warps": 2}
# Where programs are few, and where one of them holds a whole window: of so many slots.
WIDE, FEW = {"BLOCK_S": 32, "STAGES": 3, "num_warps": 4}, 256
WHOLE, MOST_WHOLE = {"num_warps": 4}, 129
# Of windows (up to so many slots), from so many rows and heads on: tiles of short slots, of long.
SHORT, LONG = 256, 128
SLIM, THIN = ({"BLOCK_S": size, "STAGES": 2, "num_warps": 1} for size in (8, 32))
MANY = {
    8192: (SLIM, {**SLIM, "BLOCK_S": 4}),
    4096: (SLIM, SLIM),
    2048: ({"BLOCK_S": 16, "STAGES": 3, "num_warps": 1}, SLIM),
    1024: (THIN, TILE),
    0: ({**TILE, "BLOCK_S": 32}, {**TILE, "BLOCK_S": 32}),
}
# Where several queries share their keys; by bytes of a cached number.
GROUPED = {size: {"BLOCK_S": 128 // size, "STAGES": 2, "num_warps": 4} for size in (2, 4)}
# Rows of the smallest matrix that matrix units multiply.
SMALLEST_MATRIX = 16
JOIN = {"num_warps": 4}
# Below any score, and finite, so that what has seen no slot weighs nothing.
LOWEST = tl.constexpr(-1e30)
# Programs wanted, so that the last ones of a device's waves cost little, and slots that a
# program should not go below.
PROGRAMS, SMALLEST = 4096, 256


@triton.jit
@no_type_check
def _turns(position, frequencies, lane, R: tl.constexpr):
    """Rotary: by what a channel is multiplied at a position, and by what its pair's other half."""
    pair = tl.where(lane < R, lane, lane - R)
    angle = position.to(tl.float64) * tl.load(frequencies + pair, mask=lane < 2 * R, other=0.0)
    # In turns, so that float32 sees an angle below 2 pi at any position.
    turns = angle * 0.15915494309189535
    angle = ((turns - tl.floor(turns)) * 6.283185307179586).to(tl.float32)
    turned = lane < 2 * R
    own, other = tl.where(turned, tl.cos(angle), 1.0), tl.where(turned, tl.sin(angle), 0.0)
    return own, tl.where(lane < R, -other, other)


@triton.jit
@no_type_check
def _rotated(x_ptr, lane, own, other, D: tl.constexpr, R: tl.constexpr):
    """A head of D channels at `x_ptr`, rotated, in float32: channel i is paired with i + R."""
    x = tl.load(x_ptr + lane, mask=lane < D, other=0.0).to(tl.float32)
    if R == 0:
        return x
    half = tl.where(lane < R, lane + R, lane - R)
    half = tl.load(x_ptr + half, mask=lane < 2 * R, other=0.0).to(tl.float32)
    return x * own + half * other


@triton.jit
@no_type_check
def _place(seen_ptr, frequencies, row, slots, lane, R: tl.constexpr):
    """The new token's slot, how many slots hold others, and its rotation."""
    position = tl.load(seen_ptr + row)
    own, other = _turns(position, frequencies, lane, R)
    return (position % slots).to(tl.int32), tl.minimum(position, slots - 1).to(tl.int32), own, other


@triton.jit
@no_type_check
def _new_token(
    k_ptr,
    v_ptr,
    row,
    head,
    k_stride,
    v_stride,
    lane,
    own,
    other,
    dtype: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
):
    """Its key, rotated as the cache stores it, and value."""
    key = _rotated(k_ptr + row * k_stride + head * D, lane, own, other, D, R)
    value = tl.load(v_ptr + row * v_stride + head * D + lane, mask=lane < D, other=0.0)
    return key.to(dtype), value


@triton.jit
@no_type_check
def _tile(
    keys_ptr,
    values_ptr,
    first,
    end,
    place,
    base,
    lane,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Keys and values of BLOCK_S slots from number `first` on, and which count."""
    number = first + tl.arange(0, BLOCK_S)
    real = number < end
    # The new token's slot is left out.
    slot = number + (number >= place).to(tl.int32)
    cell = base + slot.to(tl.int64)[:, None] * (G * D) + lane[None, :]
    present = real[:, None] & (lane < D)[None, :]
    k = tl.load(keys_ptr + cell, mask=present, other=0.0)
    return k, tl.load(values_ptr + cell, mask=present, other=0.0), real


@triton.jit
@no_type_check
def _window_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    seen_ptr,
    frequencies,
    out_ptr,
    parts_ptr,
    q_stride,
    k_stride,
    v_stride,
    slots,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """All slots in one tile, which is on its way before the kernel waits."""
    row, head, lane = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
    inside = lane < D
    let_next_start(OVERLAP)
    place, past, own, other = _place(seen_ptr, frequencies, row, slots, lane, R)
    base = row * slots * (G * D) + head * D
    k, v, real = _tile(keys_ptr, values_ptr, 0, past, place, base, lane, G, D, BLOCK_S)
    only_wait(OVERLAP)
    key, value = _new_token(
        *(k_ptr, v_ptr, row, head, k_stride, v_stride, lane, own, other),
        *(keys_ptr.dtype.element_ty, D, R),
    )
    query = _rotated(q_ptr + row * q_stride + head * D, lane, own, other, D, R) * SCALE
    tl.store(keys_ptr + base + place * (G * D) + lane, key, mask=inside)
    tl.store(values_ptr + base + place * (G * D) + lane, value, mask=inside)
    score = tl.sum(k.to(tl.float32) * query[None, :], axis=1)
    score = tl.where(real, score, float("-inf"))
    own = tl.sum(query * key.to(tl.float32))
    peak = tl.maximum(tl.max(score), own)
    weight, own = tl.exp(score - peak), tl.exp(own - peak)
    out = tl.sum(v.to(tl.float32) * weight[:, None], axis=0) + own * value.to(tl.float32)
    out /= tl.sum(weight) + own
    tl.store(out_ptr + (row * G + head) * D + lane, out, mask=inside)


@triton.jit
@no_type_check
def _attention_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    seen_ptr,
    frequencies,
    out_ptr,
    parts_ptr,
    q_stride,
    k_stride,
    v_stride,
    slots,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, BLOCK_D)
    inside = lane < D
    let_next_start(OVERLAP)
    place, past, own, other = _place(seen_ptr, frequencies, row, slots, lane, R)
    base = row * slots * (G * D) + head * D
    share = tl.cdiv(past, SPLITS)
    begin, end = part * share, tl.minimum(part * share + share, past)
    q = q_ptr + row * q_stride + head * D
    query = tl.zeros((BLOCK_D,), tl.float32)
    # Row r of a tile keeps a softmax of its own over slots r, r + BLOCK_S, ...; rows are
    # joined once, at the end.
    peaks = tl.full((BLOCK_S,), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK_S,), tl.float32)
    tile = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    # Several tiles are on their way at a time.
    for first in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        k, v, real = _tile(keys_ptr, values_ptr, first, end, place, base, lane, G, D, BLOCK_S)
        # The first tiles are on their way before the query is waited for.
        if first == begin:
            only_wait(OVERLAP)
            query = _rotated(q, lane, own, other, D, R) * SCALE
        score = tl.sum(k.to(tl.float32) * query[None, :], axis=1)
        score = tl.where(real, score, float("-inf"))
        higher = tl.maximum(peaks, score)
        shrink, weight = tl.exp(peaks - higher), tl.exp(score - higher)
        totals = totals * shrink + weight
        tile = tile * shrink[:, None] + v.to(tl.float32) * weight[:, None]
        peaks = higher
    only_wait(OVERLAP)
    query = _rotated(q, lane, own, other, D, R) * SCALE
    key, value = _new_token(
        *(k_ptr, v_ptr, row, head, k_stride, v_stride, lane, own, other),
        *(keys_ptr.dtype.element_ty, D, R),
    )
    # The new token counts in the first part.
    own = tl.where(part == 0, tl.sum(query * key.to(tl.float32)), LOWEST)
    peak = tl.maximum(tl.max(peaks), own)
    scale, own = tl.exp(peaks - peak), tl.where(part == 0, tl.exp(own - peak), 0.0)
    total = tl.sum(totals * scale) + own
    out = tl.sum(tile * scale[:, None], axis=0) + own * value.to(tl.float32)
    if part == 0:
        tl.store(keys_ptr + base + place * (G * D) + lane, key, mask=inside)
        tl.store(values_ptr + base + place * (G * D) + lane, value, mask=inside)
    if SPLITS == 1:
        tl.store(out_ptr + (row * G + head) * D + lane, out / total, mask=inside)
    else:
        store = parts_ptr + ((row * G + head) * SPLITS + part) * (BLOCK_D + 2)
        tl.store(store + lane, out)
        tl.store(store + BLOCK_D, peak)
        tl.store(store + BLOCK_D + 1, total)


@triton.jit
@no_type_check
def _grouped_attention_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    seen_ptr,
    frequencies,
    out_ptr,
    parts_ptr,
    q_stride,
    k_stride,
    v_stride,
    slots,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, owner, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    lane, member = tl.arange(0, BLOCK_D), tl.arange(0, MEMBERS)
    inside, head = lane < D, owner * GROUP + tl.minimum(member, GROUP - 1)
    wait_for_previous(OVERLAP)
    place, past, own, other = _place(seen_ptr, frequencies, row, slots, lane, R)
    base = row * slots * (G * D) + owner * D
    key, value = _new_token(
        *(k_ptr, v_ptr, row, owner, k_stride, v_stride, lane, own, other),
        *(keys_ptr.dtype.element_ty, D, R),
    )
    queries = q_ptr + row * q_stride + head[:, None] * D
    query = _rotated(queries, lane[None, :], own[None, :], other[None, :], D, R)
    query = query.to(keys_ptr.dtype.element_ty)
    peaks = tl.full((MEMBERS,), LOWEST, tl.float32)
    totals = tl.zeros((MEMBERS,), tl.float32)
    tile = tl.zeros((MEMBERS, BLOCK_D), tl.float32)
    share = tl.cdiv(past, SPLITS)
    begin, end = part * share, tl.minimum(part * share + share, past)
    for first in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        k, v, real = _tile(keys_ptr, values_ptr, first, end, place, base, lane, G, D, BLOCK_S)
        score = dot(query, tl.trans(k), "ieee") * SCALE
        score = tl.where(real[None, :], score, float("-inf"))
        higher = tl.maximum(peaks, tl.max(score, axis=1))
        shrink, weight = tl.exp(peaks - higher), tl.exp(score - higher[:, None])
        totals = totals * shrink + tl.sum(weight, axis=1)
        tile = tile * shrink[:, None]
        tile = dot_add(weight.to(v.dtype), v, tile, "ieee")
        peaks = higher
    own = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * SCALE
    own = tl.where(part == 0, own, LOWEST)
    peak = tl.maximum(peaks, own)
    scale, own = tl.exp(peaks - peak), tl.where(part == 0, tl.exp(own - peak), 0.0)
    total = totals * scale + own
    out = tile * scale[:, None] + own[:, None] * value.to(tl.float32)[None, :]
    if part == 0:
        tl.store(keys_ptr + base + place * (G * D) + lane, key, mask=inside)
        tl.store(values_ptr + base + place * (G * D) + lane, value, mask=inside)
    real = member < GROUP
    if SPLITS == 1:
        cell = (row * (G * GROUP) + head)[:, None] * D + lane[None, :]
        tl.store(out_ptr + cell, out / total[:, None], mask=real[:, None] & inside[None, :])
    else:
        store = parts_ptr + ((row * (G * GROUP) + head) * SPLITS + part) * (BLOCK_D + 2)
        tl.store(store[:, None] + lane[None, :], out, mask=real[:, None])
        tl.store(store + BLOCK_D, peak, mask=real)
        tl.store(store + BLOCK_D + 1, total, mask=real)


@triton.jit
@no_type_check
def _join_kernel(
    parts_ptr,
    out_ptr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    lane, part = tl.arange(0, BLOCK_D), tl.arange(0, SPLITS)
    parts = parts_ptr + (pair * SPLITS + part) * (BLOCK_D + 2)
    wait_for_previous(OVERLAP)
    peak = tl.load(parts + BLOCK_D)
    weight = tl.exp(peak - tl.max(peak))
    total = tl.sum(weight * tl.load(parts + BLOCK_D + 1))
    out = tl.sum(weight[:, None] * tl.load(parts[:, None] + lane[None, :]), axis=0)
    tl.store(out_ptr + pair * D + lane, out / total, mask=lane < D)


def attention_step_kernel(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B G D"],
    v: Float[Tensor, "B G D"],
    keys: Float[Tensor, "B S G D"],
    values: Float[Tensor, "B S G D"],
    seen: Int[Tensor, " B"],
    frequencies: Float[Tensor, " R"],
) -> Float[Tensor, "B H D"]:
    """Softmax attention of token `seen` over the cache and itself; writes it to the cache.

    q and k are as projected, not rotated (heads contiguous, H a multiple of G);
    `frequencies` are float64. The cache is contiguous. `seen` is not advanced.
    """
    (B, H, D), (S, G), R = q.shape, keys.shape[1:3], frequencies.shape[0]
    out = torch.empty((B, H, D), dtype=v.dtype, device=v.device)
    block_d, splits = 1 << (D - 1).bit_length(), split_count(B * G, S)
    parts = torch.empty(
        B * H * splits * (block_d + 2) if splits > 1 else 1, dtype=torch.float32, device=q.device
    )
    few = B * H * splits <= FEW
    kernel, choices = _attention_step_kernel, WIDE if few else _tile_of(B * H, S, block_d)
    if few and splits == 1 < S <= MOST_WHOLE:
        kernel, choices = _window_step_kernel, {**WHOLE, "BLOCK_S": 1 << (S - 2).bit_length()}
    if H > G:
        members = max(SMALLEST_MATRIX, 1 << (H // G - 1).bit_length())
        kernel, choices = _grouped_attention_step_kernel, GROUPED[keys.element_size()]
        block_d = max(block_d, SMALLEST_MATRIX)
        choices = {**choices, "MEMBERS": members, "GROUP": H // G}
    kernel[(B, G, splits)](
        q,
        k,
        v,
        keys,
        values,
        seen,
        frequencies,
        out,
        parts,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        S,
        SCALE=D**-0.5,
        G=G,
        D=D,
        R=R,
        SPLITS=splits,
        BLOCK_D=block_d,
        **overlap(q, reads_state=H == G),
        **choices,
    )
    if splits > 1:
        sizes = {"D": D, "SPLITS": splits, "BLOCK_D": block_d}
        _join_kernel[(B * H,)](parts, out, **sizes, **overlap(q), **JOIN)
    return out


def _tile_of(pairs: int, slots: int, width: int) -> dict[str, int]:
    """Slots of a tile, and so on, for more than FEW pairs of a row and a head."""
    if slots > SHORT:
        return TILE
    return next(tiles[width >= LONG] for least, tiles in MANY.items() if pairs >= least)


def split_count(pairs: int, slots: int) -> int:
    """Parts (a power of two) in which each of `pairs` rows and heads reads its slots."""
    wanted = max(1, min(-(-PROGRAMS // pairs), slots // SMALLEST))
    return 2 ** (wanted.bit_length() - 1)
