"""Delta rules in chunks: time and memory linear in length, any device.

What token t adds to the state depends on what the tokens before it added: inside
a chunk, a triangular system. Solved once for the chunk's own part (u) and for a
state it may begin with (w), the additions are u + w S (the WY or UT form, arXiv
2406.06484 section 3); a short loop carries S from chunk to chunk.
"""

from collections.abc import Callable
from functools import partial

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
def delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs in v's dtype and the final state, as `reference.py` defines them.

    Keys come normalised (beta |k|^2 <= 2, or the rule diverges) and queries
    scaled. log_decay <= 0, none if not given. The state starts at zero when it is
    not given; accumulation and state are float32 (float64 for float64 inputs).
    """
    state = _start(k, v, state)
    if v.shape[1] == 0:
        return v, state
    kind = "delta_rule" if log_decay is None else "gated_delta_rule"
    kernel = _peer(f"fla.ops.{kind}", f"chunk_{kind}", k, v, state)
    if kernel is not None:
        gates = {"beta": beta.to(v.dtype)}
        gates |= {} if log_decay is None else {"g": log_decay.float()}
        return kernel(q=q.to(v.dtype), k=k.to(v.dtype), v=v, **gates)
    gate = torch.zeros_like(beta) if log_decay is None else log_decay
    if has_kernel(v, k.shape[3]):
        # b_t = -beta exp(log_decay) k_t: the state fades before the rule looks at it.
        b = -(beta * gate.exp())[..., None] * k
        # A view, for torch.compile refuses one tensor in two places.
        a = k.view_as(k)
        moved = beta[..., None] * v
        out, state = linear_recurrence(q, k, moved, a, b, gate[..., None], state)
        return out.to(v.dtype), state
    T, dtype, out_dtype = v.shape[1], state.dtype, v.dtype
    inputs = (q, k, v, beta[..., None], gate[..., None])
    q, k, v, beta, g = (to_chunks(x.to(dtype), chunk_of(T, CHUNK)) for x in inputs)
    decay, to_token = segment_sums(g[..., 0]).exp(), g.cumsum(-2).exp()
    system = (beta * (k @ k.mT) * decay).tril(-1)
    w, u = _solve(system, -beta * k * to_token, beta * v)
    keys = k * sums_to_end(g).exp()
    added, before, state = _carry(u, w, keys, g, state)
    out = (q @ k.mT * decay) @ added + (q @ before) * to_token
    return from_chunks(out, T).to(out_dtype), state


@without_autocast
def generalized_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    log_decay: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs in v's dtype and the final state, as `reference.py` defines them; see `delta_rule`.

    For a bounded state |b_t a_t^T| must not exceed what the decay takes away.
    """
    state = _start(k, v, state)
    if v.shape[1] == 0:
        return v, state
    kernel = _peer("fla.ops.generalized_delta_rule", "chunk_dplr_delta_rule", k, v, state)
    if kernel is not None:
        q, k, a, b = (x.to(v.dtype) for x in (q, k, a, b))
        return kernel(q=q, k=k, v=v, a=a, b=b, gk=log_decay.float())
    if has_kernel(v, k.shape[3], k.shape[3]):
        return linear_recurrence(q, k, v, a, b, log_decay, state)
    T, dtype, out_dtype = v.shape[1], state.dtype, v.dtype
    inputs = (q, k, v, a, b, log_decay)
    q, k, v, a, b, g = (to_chunks(x.to(dtype), chunk_of(T, CHUNK)) for x in inputs)
    # The state gains along k what is given (v), and along b what it held for a.
    columns, decay = torch.stack([k, b]), g[None]
    (given, system), to_before = decayed_scores(a[None], columns, decay, exclusive=True)
    (read_given, read_held), to_token = decayed_scores(q[None], columns, decay)
    w, u = _solve(-system, a * to_before[0].exp(), given @ v)
    to_end = sums_to_end(g).exp()
    held, before, state = _carry(u, w, b * to_end, g, state, (k * to_end).mT @ v)
    out = read_given @ v + read_held @ held + (q * to_token[0].exp()) @ before
    return from_chunks(out, T).to(out_dtype), state


def _start(k: Tensor, v: Tensor, state: Tensor | None) -> Float[Tensor, "B H K V"]:
    if state is not None:
        return state
    shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    return torch.zeros(shape, dtype=state_dtype(v.dtype), device=v.device)


def _peer(
    module: str, name: str, k: Tensor, v: Tensor, state: Tensor
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """flash-linear-attention's kernel, for 16-bit GPU tensors and heads of at most 256."""
    kernel = peer_kernel(module, name, v, (torch.bfloat16, torch.float16))
    if kernel is None or k.shape[3] > 256:
        return None
    return partial(kernel, scale=1.0, initial_state=state, output_final_state=True)


def _solve(
    system: Float[Tensor, "*S L L"], w: Float[Tensor, "*S L K"], u: Float[Tensor, "*S L V"]
) -> tuple[Float[Tensor, "*S L K"], Float[Tensor, "*S L V"]]:
    """(I + system)^-1 applied to w and u; `system` is strictly lower triangular."""
    both = torch.linalg.solve_triangular(
        system, torch.cat([w, u], dim=-1), upper=False, unitriangular=True
    )
    return both[..., : w.shape[-1]], both[..., w.shape[-1] :]


def _carry(
    u: Float[Tensor, "B H M L V"],
    w: Float[Tensor, "B H M L K"],
    keys: Float[Tensor, "B H M L K"],
    log_decay: Float[Tensor, "B H M L #K"],
    state: Float[Tensor, "B H K V"],
    extra: Float[Tensor, "B H M K V"] | None = None,
) -> tuple[Float[Tensor, "B H M L V"], Float[Tensor, "B H M K V"], Float[Tensor, "B H K V"]]:
    """Every token's addition u + w S, the state S before each chunk, and after the last."""
    decay, added, before = log_decay.sum(-2).exp()[..., None], [], []
    for number in range(u.shape[2]):
        before.append(state)
        added.append(u[:, :, number] + w[:, :, number] @ state)
        state = decay[:, :, number] * state + keys[:, :, number].mT @ added[-1]
        state = state if extra is None else state + extra[:, :, number]
    return torch.stack(added, dim=2), torch.stack(before, dim=2), state
