"""Taylor linear attention in chunks: time and memory linear in length, any device.

Inside a chunk of tokens the quadratic form is exact and cheap; what came before
the chunk is read from the state, phi(q) S. Chunks are taken many at a time, in
blocks whose features fit in cache, and a block is recomputed in the backward
pass, so that features never occupy memory for the whole sequence.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from based.ops.precision import without_autocast
from based.ops.taylor_linear_attention.features import (
    key_features,
    num_features,
    query_features,
    state_dtype,
)

CHUNK = 128
# Features of one block, in elements: a few tens of megabytes in float32.
BLOCK_ELEMENTS = 1 << 22


@without_autocast
def taylor_linear_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    numerator: Float[Tensor, "N H F V"] | None = None,
    denominator: Float[Tensor, "N H F"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H F V"], Float[Tensor, "N H F"]]:
    """Outputs in v's dtype and the final state, as `reference.py` defines them.

    The state starts at zero when it is not given. It has one row a sequence:
    N = B, or the number of packed sequences (then B = 1). Accumulation and
    state are float32 (float64 for float64 inputs).
    """
    dtype = state_dtype(q.dtype)
    lengths = None if cu_seqlens is None else cu_seqlens.diff().tolist()
    rows = q.shape[0] if lengths is None else len(lengths)
    state = _join(q, v, numerator, denominator, rows, dtype)
    chunk = min(CHUNK, max(q.shape[1], 1))
    # A column of ones beside the values makes the denominator one more output.
    inputs = [q.to(dtype), k.to(dtype), F.pad(v.to(dtype), (0, 1), value=1.0)]
    if lengths is None:
        inputs = [_chunks(x, chunk) for x in inputs]
        out, state = _scan(*inputs, [state], [inputs[0].shape[2]])
        out = out.flatten(2, 3)[:, :, : q.shape[1]].transpose(1, 2)
    else:
        counts = [-(-length // chunk) for length in lengths]
        index = _chunk_index(lengths, counts, chunk).to(q.device)
        inputs = [_chunks(_gather(x, index), chunk) for x in inputs]
        out, state = _scan(*inputs, list(state.split(1)), counts)
        out = out.flatten(2, 3).transpose(1, 2)[:, index >= 0]
    out = (out[..., :-1] / out[..., -1:]).to(v.dtype)
    return out, state[..., :-1], state[..., -1]


def _join(
    q: Tensor,
    v: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    rows: int,
    dtype: torch.dtype,
) -> Float[Tensor, "N H F V1"]:
    """Numerator and denominator as one tensor of V + 1 columns; zeros if not given."""
    if numerator is None or denominator is None:
        shape = (rows, q.shape[2], num_features(q.shape[3]), v.shape[3] + 1)
        return torch.zeros(shape, dtype=dtype, device=q.device)
    return torch.cat([numerator, denominator[..., None]], dim=-1).to(dtype)


def _chunks(x: Float[Tensor, "B T H D"], chunk: int) -> Float[Tensor, "B H M L D"]:
    """Pads with zeros to whole chunks (M of L tokens): zero values leave the state alone."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)


def _chunk_index(lengths: Sequence[int], counts: Sequence[int], chunk: int) -> Int[Tensor, " S"]:
    """For packed sequences: which token stands in each slot of their chunks; -1 for none."""
    index = torch.full((sum(counts) * chunk,), -1)
    slot = token = 0
    for length, count in zip(lengths, counts, strict=True):
        index[slot : slot + length] = torch.arange(token, token + length)
        slot, token = slot + count * chunk, token + length
    return index


def _gather(x: Float[Tensor, "1 T H D"], index: Int[Tensor, " S"]) -> Float[Tensor, "1 S H D"]:
    return F.pad(x, (0, 0, 0, 0, 0, 1))[:, index]


def _scan(
    q: Float[Tensor, "B H M L K"],
    k: Float[Tensor, "B H M L K"],
    v: Float[Tensor, "B H M L V1"],
    states: list[Tensor],
    counts: list[int],
) -> tuple[Float[Tensor, "B H M L V1"], Float[Tensor, "N H F V1"]]:
    """Runs `counts[i]` chunks from `states[i]` for each sequence i, block by block."""
    if q.shape[2] == 0:
        return v, torch.cat(states)
    starts = {sum(counts[:i]): i for i, count in enumerate(counts) if count}
    per_chunk = q.shape[0] * q.shape[1] * q.shape[3] * num_features(q.shape[4])
    block = max(1, BLOCK_ELEMENTS // max(per_chunk, 1))
    blocks = range(0, q.shape[2], block)
    recompute = len(blocks) > 1 and torch.is_grad_enabled()
    finals, outs = list(states), []
    state, current = states[0], 0
    for first in blocks:
        span = slice(first, first + block)
        fresh = {c - first: states[i] for c, i in starts.items() if first <= c < first + block}
        arguments = (q[:, :, span], k[:, :, span], v[:, :, span], state, fresh)
        if recompute:
            result = checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            result = _block(*arguments)
        out, after = result
        outs.append(out)
        for offset, state in enumerate(after):
            current = starts.get(first + offset, current)
            finals[current] = state
    return torch.cat(outs, dim=2), torch.cat(finals)


def _block(
    q: Float[Tensor, "B H M L K"],
    k: Float[Tensor, "B H M L K"],
    v: Float[Tensor, "B H M L V1"],
    state: Tensor,
    fresh: dict[int, Tensor],
) -> tuple[Float[Tensor, "B H M L V1"], list[Tensor]]:
    """Outputs of M chunks and the state after each; `fresh[c]` replaces it before chunk c."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    a = torch.tril(1 + s + s.square() / 2)
    added = key_features(k).transpose(-1, -2) @ v
    before, after = [], []
    for chunk in range(q.shape[2]):
        state = fresh.get(chunk, state)
        before.append(state)
        state = state + added[:, :, chunk]
        after.append(state)
    return a @ v + query_features(q) @ torch.stack(before, dim=2), after
