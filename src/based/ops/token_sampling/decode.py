"""Sampling without a sort: one program a row, a few passes over logits that the cache holds.

Where rows are few the first pass, the only one of greedy rows, is shared by programs of
a kernel of its own.

Thresholds of top-k and top-p are found by an eight-way search over the order of
float32 keys, so ties are cut exactly as the sorted reference cuts them. Rows that
do not use an option skip its passes: greedy rows make one pass. Each lane keeps
sums of its own, joined at a pass's end.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.kernels import overlap
from based.ops.overlap import wait_for_previous
from based.ops.token_sampling.drawn import Outbox

BLOCK = 4096
# Loads of later blocks are on their way while one is worked on.
STAGES = tl.constexpr(3)
LOWEST = tl.constexpr(-3.4028234663852886e38)
LAUNCH = {"num_warps": 8}
# Rows up to which a row's first pass is divided, and parts of each.
FEW, PARTS = 16, 16


@triton.jit
@no_type_check
def _scaled(logits, ids, vocab, temperature):
    x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    # Plus zero, so that the two zeros have one key.
    return tl.div_rn(x, temperature) + 0.0


@triton.jit
@no_type_check
def _keys(x):
    """Integers in the order of float32 values."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
@no_type_check
def _value(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _search(logits, vocab, temperature, top, goal, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key t such that tokens with keys >= t number, or weigh, at least `goal`."""
    # Eight sums a lane: blocks are smaller here.
    BLOCK_S: tl.constexpr = BLOCK // 4
    low = tl.full((), -(2**31), tl.int64)
    step = tl.arange(0, 8)
    for number in range(11):
        shift = tl.maximum(29 - 3 * number, 0)
        edges = low + (step.to(tl.int64) << shift)
        lanes = tl.zeros((BLOCK_S, 8), tl.float32)
        for first in tl.range(0, vocab, BLOCK_S, num_stages=STAGES):
            ids = first + tl.arange(0, BLOCK_S)
            x = _scaled(logits, ids, vocab, temperature)
            weight = tl.where(ids < vocab, tl.exp(x - top) if MASS else 1.0, 0.0)
            above = _keys(x).to(tl.int64)[:, None] >= edges[None, :]
            lanes += tl.where(above, weight[:, None], 0.0)
        reached = tl.sum(lanes, axis=0)
        passed = tl.sum(((reached >= goal) & (step > 0)).to(tl.int64))
        low += passed << shift
    return low.to(tl.int32)


@triton.jit
@no_type_check
def _above(logits, vocab, temperature, top, key, BLOCK: tl.constexpr):
    """Number and weight of tokens with keys above `key`."""
    count, mass = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        ids = first + tl.arange(0, BLOCK)
        x = _scaled(logits, ids, vocab, temperature)
        above = (_keys(x) > key) & (ids < vocab)
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(x - top), 0.0)
    return tl.sum(count), tl.sum(mass)


@triton.jit
@no_type_check
def _peaks_of(logits, begin, end, BLOCK: tl.constexpr):
    """Of ids begin .. end: the largest logit, the sum of exp(x - it), its id, how many are bad."""
    peaks, totals = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    best, strangers = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        ids = first + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        strange = ((x != x) | (tl.abs(x) == float("inf"))) & (ids < end)
        strangers += strange.to(tl.int32)
        x = tl.where(strange, 0.0, x)
        best = tl.where(x > peaks, ids, best)
        # One of exp(peaks - higher) and exp(x - higher) is 1.
        other = tl.exp(-tl.abs(x - peaks))
        totals = tl.where(x > peaks, totals * other + 1.0, totals + other)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks)
    total = tl.sum(totals * tl.exp(peaks - peak))
    return peak, total, tl.min(tl.where(peaks == peak, best, end)), tl.sum(strangers)


@triton.jit
@no_type_check
def _sample_peaks_kernel(
    logits_ptr,
    parts_ptr,  # [rows, PARTS, 4]
    vocab: tl.constexpr,
    stride: tl.constexpr,
    SHARE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * SHARE
    wait_for_previous(OVERLAP)
    peak, total, token, bad = _peaks_of(
        logits_ptr + row * stride, begin, tl.minimum(begin + SHARE, vocab), BLOCK
    )
    found = parts_ptr + (row * PARTS + part) * 4
    tl.store(found, peak)
    tl.store(found + 1, total)
    # Ids as bits: a float32 counts to 2^24 alone.
    tl.store(found + 2, token.to(tl.float32, bitcast=True))
    tl.store(found + 3, bad.to(tl.float32))


@triton.jit
@no_type_check
def _sample_kernel(
    logits_ptr,
    parts_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    seed_ptr,
    position_ptr,
    tokens_ptr,
    logprobs_ptr,
    posted_tokens_ptr,
    posted_logprobs_ptr,
    turns_ptr,
    vocab: tl.constexpr,
    stride: tl.constexpr,
    POSTED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * stride
    wait_for_previous(OVERLAP)
    if PARTS > 1:
        part = tl.arange(0, BLOCK_P)
        scanned, real = parts_ptr + (row.to(tl.int64) * PARTS + part) * 4, part < PARTS
        peaks = tl.load(scanned, mask=real, other=LOWEST)
        peak, bad = tl.max(peaks), tl.sum(tl.load(scanned + 3, mask=real, other=0.0))
        total = tl.sum(tl.load(scanned + 1, mask=real, other=0.0) * tl.exp(peaks - peak))
        best = tl.load(scanned + 2, mask=real, other=0.0).to(tl.int32, bitcast=True)
        token = tl.min(tl.where(peaks == peak, best, vocab))
    else:
        peak, total, token, bad = _peaks_of(logits, 0, vocab, BLOCK)
    position = tl.load(position_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0) & (bad == 0):
        top = tl.div_rn(peak, temperature)
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        edge, ties = tl.full((), -(2**31), tl.int32), tl.zeros((), tl.int32)
        if top_k < vocab:
            goal = top_k.to(tl.float32)
            edge = _search(logits, vocab, temperature, top, goal, False, BLOCK)
            above, _ = _above(logits, vocab, temperature, top, edge, BLOCK)
            ties = top_k.to(tl.int32) - above
        count, mass = _above(logits, vocab, temperature, top, edge, BLOCK)
        tie_weight = tl.where(ties > 0, tl.exp(_value(edge) - top), 0.0)
        mass += ties * tie_weight
        if top_p < 1:
            goal = top_p * mass
            found = _search(logits, vocab, temperature, top, goal, True, BLOCK)
            if found > edge:
                edge, ties = found, tl.full((), vocab, tl.int32)
            count, mass = _above(logits, vocab, temperature, top, edge, BLOCK)
            tie_weight = tl.exp(_value(edge) - top)
            room = tl.ceil((goal - mass) / tl.maximum(tie_weight, 1e-38))
            ties = tl.minimum(ties, tl.minimum(room, 2.0**30).to(tl.int32))
            ties = tl.maximum(ties, (count == 0).to(tl.int32))
            mass += ties * tie_weight
        word = tl.randint(tl.load(seed_ptr + row), position)
        uniform = (word.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 2.0**-24
        target, reached = uniform * mass, tl.zeros((), tl.float32)
        tied, hit, last = tl.zeros((), tl.int32), tl.full((), vocab, tl.int32), token
        for first in range(0, vocab, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            x = _scaled(logits, ids, vocab, temperature)
            key = _keys(x)
            tie = ((key == edge) & (ids < vocab)).to(tl.int32)
            kept = (key > edge) | ((tie > 0) & (tied + tl.cumsum(tie) <= ties))
            kept = kept & (ids < vocab)
            weight = tl.where(kept, tl.exp(x - top), 0.0)
            passed = kept & (reached + tl.cumsum(weight) > target)
            hit = tl.minimum(hit, tl.min(tl.where(passed, ids, vocab)))
            last = tl.maximum(last, tl.max(tl.where(kept, ids, 0)))
            reached += tl.sum(weight)
            tied += tl.sum(tie)
        # Sums in another order may end a hair below the target.
        token = tl.where(hit < vocab, hit, last)
    token = tl.where(bad > 0, 0, token)
    logprob = tl.load(logits + token).to(tl.float32) - peak - tl.log(total)
    logprob = tl.where(bad > 0, float("nan"), logprob)
    tl.store(position_ptr + row, position + 1)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, logprob)
    if POSTED > 0:
        turn = tl.load(turns_ptr + row)
        tl.store(posted_tokens_ptr + turn * 2 * POSTED + row, token.to(tl.int64))
        tl.store(posted_logprobs_ptr + turn * 2 * POSTED + row, logprob)
        tl.store(turns_ptr + row, 1 - turn)
        if row == 0:
            # Rows that are not in this step keep pace.
            for first in range(tl.num_programs(0), POSTED, BLOCK):
                rows = first + tl.arange(0, BLOCK)
                tl.store(turns_ptr + rows, 1 - turn, mask=rows < POSTED)


def sample_tokens_kernel(
    logits: Float[Tensor, "B V"],
    temperature: Float[Tensor, " B"],
    top_k: Int[Tensor, " B"],
    top_p: Float[Tensor, " B"],
    seed: Int[Tensor, " B"],
    position: Int[Tensor, " B"],
    tokens: Int[Tensor, " B"],
    logprobs: Float[Tensor, " B"],
    outbox: Outbox | None = None,
    peaks: Float[Tensor, "B P 4"] | None = None,
    block: int = BLOCK,
) -> None:
    """As `sample_tokens_reference`, in float32, into `tokens` and `logprobs`, and `outbox`.

    Advances `position`. `logits` has contiguous rows, not scanned where `peaks` are given.
    """
    rows, vocab = logits.shape
    # Constants, so that rows are known to be aligned.
    sizes = {"vocab": vocab, "stride": logits.stride(0)}
    parts = peaks.shape[1] if peaks is not None else PARTS if rows <= FEW else 1
    posted = (tokens, logprobs, position) if outbox is None else outbox.columns()
    scanned = logits if peaks is None else peaks
    if peaks is None and parts > 1:
        scanned = logits.new_empty((rows, parts, 4), dtype=torch.float32)
        share = triton.cdiv(triton.cdiv(vocab, parts), 16) * 16
        smaller = min(block, triton.next_power_of_2(share))
        _sample_peaks_kernel[(rows, parts)](
            logits,
            scanned,
            SHARE=share,
            PARTS=parts,
            BLOCK=smaller,
            **sizes,
            **overlap(logits),
            **LAUNCH,
        )
    _sample_kernel[(rows,)](
        logits,
        scanned,
        temperature,
        top_k,
        top_p,
        seed,
        position,
        tokens,
        logprobs,
        *posted,
        POSTED=0 if outbox is None else len(outbox.turns),
        PARTS=parts,
        BLOCK_P=triton.next_power_of_2(parts),
        BLOCK=block,
        **sizes,
        **overlap(logits),
        **LAUNCH,
    )
