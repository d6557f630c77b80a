"""Linear attention in chunks: time and memory linear in length, any device.

Inside a chunk of tokens the quadratic form is exact and cheap; what came before
the chunk is read from the state, phi(q) S. Chunks are taken many at a time, in
blocks whose features fit in cache, and a block is recomputed in the backward
pass, so that features never occupy memory for the whole sequence.

`scan` serves every `Similarity` a(q, k) = phi(q).phi(k): Taylor's, whose features
are made inside the blocks, and the plain product of features given from outside.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from based.ops.chunks import to_chunks
from based.ops.linear_attention.quadratic import SHORT, quadratic
from based.ops.linear_attention.similarity import PRODUCT, Similarity
from based.ops.precision import state_dtype, without_autocast

CHUNK = 128
# Features of one block, in elements: a few megabytes in float32, so that they stay in cache.
BLOCK_ELEMENTS = 1 << 21


@without_autocast
def linear_attention(
    q: Float[Tensor, "B T H F"],
    k: Float[Tensor, "B T H F"],
    v: Float[Tensor, "B T H V"],
    numerator: Float[Tensor, "N H F V"] | None = None,
    denominator: Float[Tensor, "N H F"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H F V"], Float[Tensor, "N H F"]]:
    """Outputs in v's dtype and the final state, as `reference.py` defines them; see `scan`."""
    return scan(PRODUCT, q, k, v, numerator, denominator, cu_seqlens)


@without_autocast
def linear_attention_outputs(
    q: Float[Tensor, "B T H F"],
    k: Float[Tensor, "B T H F"],
    v: Float[Tensor, "B T H V"],
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """What training needs: the outputs from an empty state, and no state after."""
    return outputs(PRODUCT, q, k, v, cu_seqlens)


def outputs(
    similarity: Similarity, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """The outputs of `scan` from an empty state, in whichever form is faster."""
    if cu_seqlens is None and q.shape[1] <= SHORT:
        return quadratic(similarity, q, k, v)
    return scan(similarity, q, k, v, None, None, cu_seqlens)[0]


def scan(
    similarity: Similarity,
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    numerator: Float[Tensor, "N H F V"] | None,
    denominator: Float[Tensor, "N H F"] | None,
    cu_seqlens: Int[Tensor, " E"] | None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H F V"], Float[Tensor, "N H F"]]:
    """Outputs in v's dtype and the final state, for any similarity.

    The state starts at zero when it is not given. It has one row a sequence:
    N = B, or the number of packed sequences (then B = 1). Accumulation and
    state are float32 (float64 for float64 inputs).
    """
    lengths = [q.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    rows = q.shape[0] if cu_seqlens is None else len(lengths)
    features = similarity.num_features(q.shape[3])
    state = _join(v, numerator, denominator, (rows, q.shape[2], features))
    if q.shape[1] == 0:
        return v, state[..., :-1], state[..., -1]
    chunk = min(CHUNK, q.shape[1])
    per_chunk = q.shape[0] * q.shape[2] * chunk * features
    plan = _plan(similarity, lengths, chunk, max(1, BLOCK_ELEMENTS // per_chunk))
    if cu_seqlens is None:
        out, state = _Scan.apply(plan, q, k, v, state, None)
    else:
        index = _chunk_index(lengths, chunk).to(q.device)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, 1))[:, index] for x in (q, k, v))
        out, state = _Scan.apply(plan, q, k, v, state, index >= 0)
        out = out[:, index >= 0]
    return out, state[..., :-1], state[..., -1]


class _Span(NamedTuple):
    """One block: its tokens, and which of its chunks begin and end which sequences."""

    tokens: slice
    begins: dict[int, int]
    ends: dict[int, int]


class _Plan(NamedTuple):
    similarity: Similarity
    chunk: int
    spans: list[_Span]
    packed: bool


def _plan(similarity: Similarity, lengths: Sequence[int], chunk: int, size: int) -> _Plan:
    """Cuts the chunks of all sequences into blocks of `size` chunks."""
    counts = [-(-length // chunk) for length in lengths]
    edges = list(accumulate(counts, initial=0))
    begins = {edges[i]: i for i, count in enumerate(counts) if count}
    ends = {edges[i + 1] - 1: i for i, count in enumerate(counts) if count}
    spans = [
        _Span(
            slice(first * chunk, (first + size) * chunk),
            {c - first: i for c, i in begins.items() if first <= c < first + size},
            {c - first: i for c, i in ends.items() if first <= c < first + size},
        )
        for first in range(0, edges[-1], size)
    ]
    return _Plan(similarity, chunk, spans, packed=len(lengths) > 1)


def _join(
    v: Tensor, numerator: Tensor | None, denominator: Tensor | None, shape: tuple[int, int, int]
) -> Float[Tensor, "N H F V1"]:
    """Numerator and denominator as one tensor of V + 1 columns; zeros if not given."""
    dtype = state_dtype(v.dtype)
    if numerator is None or denominator is None:
        return torch.zeros((*shape, v.shape[3] + 1), dtype=dtype, device=v.device)
    return torch.cat([numerator, denominator[..., None]], dim=-1).to(dtype)


def _chunk_index(lengths: Sequence[int], chunk: int) -> Int[Tensor, " S"]:
    """For packed sequences: which token stands in each slot of their chunks; -1 for none."""
    slots, token = [], 0
    for length in lengths:
        tokens = torch.arange(token, token + length)
        slots.append(F.pad(tokens, (0, -length % chunk), value=-1))
        token += length
    return torch.cat(slots)


class _Scan(torch.autograd.Function):
    """Block after block; the backward pass computes each block anew, from the last to the first.

    Only the state before each block is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B T H K"],
        v: Float[Tensor, "B T H V"],
        states: Float[Tensor, "N H F V1"],
        exists: Bool[Tensor, " T"] | None,
    ) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H F V1"]]:
        out, finals = torch.empty_like(v), states.clone()
        carry, carries = _rows(states, 0, plan), []
        for span in plan.spans:
            carries.append(carry)
            part = span.tokens
            mask = None if exists is None else exists[part]
            fresh = {c: _rows(states, i, plan) for c, i in span.begins.items()}
            out[:, part], after = _block(
                plan, q[:, part], k[:, part], v[:, part], mask, carry, fresh
            )
            for chunk, i in span.ends.items():
                _rows(finals, i, plan).copy_(after[chunk])
            carry = after[-1]
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, states, exists, *carries)
        return out, finals

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (d_out, d_finals), plan = gradients, ctx.plan
        q, k, v, states, exists, *carries = ctx.saved_tensors
        d_inputs = [torch.empty_like(x) for x in (q, k, v)]
        # A sequence of no tokens hands its state through.
        d_states, d_carry = d_finals.clone(), None
        for span, carry in zip(reversed(plan.spans), reversed(carries), strict=True):
            with torch.enable_grad():
                parts = [x[:, span.tokens] for x in (q, k, v)]
                mask = None if exists is None else exists[span.tokens]
                leaves = [x.detach().requires_grad_() for x in (*parts, carry)]
                q_part, k_part, v_part, before = leaves
                fresh = {
                    c: _rows(states, i, plan).detach().requires_grad_()
                    for c, i in span.begins.items()
                }
                out, after = _block(plan, q_part, k_part, v_part, mask, before, fresh)
            outputs = [out, *(after[c] for c in span.ends)]
            d_outputs = [d_out[:, span.tokens]]
            d_outputs += [_rows(d_finals, i, plan) for i in span.ends.values()]
            if d_carry is not None:
                outputs, d_outputs = [*outputs, after[-1]], [*d_outputs, d_carry]
            leaves += fresh.values()
            grads = torch.autograd.grad(outputs, leaves, d_outputs, allow_unused=True)
            for total, part in zip(d_inputs, grads[:3], strict=True):
                total[:, span.tokens] = part
            d_carry = grads[3]
            for i, part in zip(span.begins.values(), grads[4:], strict=True):
                _rows(d_states, i, plan).copy_(part)
        return None, *d_inputs, d_states, None


def _rows(states: Tensor, sequence: int, plan: _Plan) -> Tensor:
    """The state of one packed sequence, or of the whole batch."""
    return states[sequence : sequence + 1] if plan.packed else states


def _block(
    plan: _Plan,
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    exists: Bool[Tensor, " T"] | None,
    state: Float[Tensor, "B H F V1"],
    fresh: dict[int, Tensor],
) -> tuple[Float[Tensor, "B T H V"], list[Tensor]]:
    """Outputs of some chunks and the state after each; `fresh[c]` replaces it before chunk c."""
    tokens, dtype, similarity = q.shape[1], v.dtype, plan.similarity
    # A column of ones beside the values makes the denominator one more output.
    v = F.pad(v.to(state.dtype), (0, 1), value=1.0)
    if exists is not None:
        v = v * exists[:, None, None]
    q, k, v = (to_chunks(x.to(state.dtype), plan.chunk) for x in (q, k, v))
    a = torch.tril(similarity.weights(q, k))
    added = similarity.key_features(k).transpose(-1, -2) @ v
    before, after = [], []
    for number in range(q.shape[2]):
        state = fresh.get(number, state)
        before.append(state)
        state = state + added[:, :, number]
        after.append(state)
    out = a @ v + similarity.query_features(q) @ torch.stack(before, dim=2)
    out = out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]
    return (out[..., :-1] / (out[..., -1:] + similarity.epsilon)).to(dtype), after
