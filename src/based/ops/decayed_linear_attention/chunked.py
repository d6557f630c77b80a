"""Decayed linear attention in chunks: time and memory linear in length, any device.

Inside a chunk the decayed scores are exact products; what came before the chunk
is read from the state, which a short loop carries from chunk to chunk.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from based.ops.chunks import chunk_of, from_chunks, to_chunks
from based.ops.decay import decayed_scores, segment_sums, sums_to_end
from based.ops.linear_recurrence import has_kernel, linear_recurrence
from based.ops.peers import peer_kernel
from based.ops.precision import state_dtype, without_autocast

CHUNK = 64


@without_autocast
def decayed_linear_attention(
    q: Float[Tensor, "B T #H K"],
    k: Float[Tensor, "B T #H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H #K"],
    state: Float[Tensor, "B H K V"] | None = None,
    bonus: Float[Tensor, "H K"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs in v's dtype and the final state, as `reference.py` defines them.

    log_decay <= 0 is one number a head (last axis 1) or one a channel. q and k
    with one head are shared by all. The state starts at zero when it is not
    given; accumulation and state are float32 (float64 for float64 inputs).
    """
    T, dtype = v.shape[1], state_dtype(v.dtype)
    if state is None:
        state = torch.zeros(
            (v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype=dtype, device=v.device
        )
    if T == 0:
        return v, state
    if (found := _peer(q, k, v, log_decay, state, bonus)) is not None:
        return found
    if bonus is None and has_kernel(v, k.shape[3], log_decay.shape[3]):
        q, k = (x.expand(-1, -1, v.shape[2], -1) for x in (q, k))
        return linear_recurrence(q, k, v, None, None, log_decay, state)
    chunk, out_dtype = chunk_of(T, CHUNK), v.dtype
    if bonus is not None:
        log_decay = log_decay.expand(-1, -1, -1, k.shape[3])
    q, k, v, g = (to_chunks(x.to(dtype), chunk) for x in (q, k, v, log_decay))
    if g.shape[-1] == 1:
        # Decays stand on values and outputs, so that shared queries and keys stay shared.
        scores = (q @ k.mT) * segment_sums(g[..., 0]).exp()
        added = k.mT @ (v * sums_to_end(g).exp())
        before, state = _carry(added, g, state)
        out = scores @ v + (q @ before) * g.cumsum(-2).exp()
    else:
        scores, to_token = decayed_scores(q, k, g, exclusive=bonus is not None)
        added = (k * sums_to_end(g).exp()).mT @ v
        before, state = _carry(added, g, state)
        out = scores @ v + (q * to_token.exp()) @ before
    if bonus is not None:
        out = out + (q * bonus.to(dtype)[:, None, None] * k).sum(-1, keepdim=True) * v
    return from_chunks(out, T).to(out_dtype), state


def _carry(
    added: Float[Tensor, "B H M K V"],
    log_decay: Float[Tensor, "B H M L #K"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H M K V"], Float[Tensor, "B H K V"]]:
    """The state before each chunk, and after the last."""
    decay, before = log_decay.sum(-2).exp()[..., None], []
    for number in range(added.shape[2]):
        before.append(state)
        state = decay[:, :, number] * state + added[:, :, number]
    return torch.stack(before, dim=2), state


def _peer(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, bonus: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """flash-linear-attention's kernels for 16-bit GPU tensors: one for each kind of decay."""
    kind = "gla" if log_decay.shape[-1] > 1 else "simple_gla"
    kind = kind if bonus is None else "rwkv6"
    dtypes = (torch.bfloat16, torch.float16)
    kernel = peer_kernel(f"fla.ops.{kind}", f"chunk_{kind}", v, dtypes)
    if kernel is None:
        return None
    heads = v.shape[2]
    q, k = (x.to(v.dtype).expand(-1, -1, heads, -1) for x in (q, k))
    g = log_decay.float()
    g = g[..., 0] if kind == "simple_gla" else g.expand_as(k)
    own = () if bonus is None else (bonus.float(),)
    return kernel(q, k, v, g, *own, scale=1.0, initial_state=state, output_final_state=True)
