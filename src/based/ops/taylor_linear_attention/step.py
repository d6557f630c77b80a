"""One token: the recurrent form, at once or deferred.

The deferred step keeps the last R keys and values in a ring and takes them exactly,
as the quadratic form; the token that fills the ring folds it into the state. The
state is then written once in R tokens, which halves a decode step's memory traffic.
Where outputs are bfloat16, it halves again: a step reads upper halves (`halves.py`).
"""

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from based.ops.kernels import use_kernels
from based.ops.linear_attention import linear_attention_step
from based.ops.precision import state_dtype, without_autocast
from based.ops.taylor_linear_attention import halves
from based.ops.taylor_linear_attention.features import key_features, query_features


@without_autocast
def taylor_linear_attention_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    numerator: Float[Tensor, "B H F V"],
    denominator: Float[Tensor, "B H F"],
) -> Float[Tensor, "B H V"]:
    """Adds one key and value to the state, in place, and reads the query's output.

    Arithmetic is float32 or wider, whatever the numerator is stored in.
    """
    if use_kernels(q):
        from based.ops.taylor_linear_attention.decode import taylor_step_kernel

        return taylor_step_kernel(q, k, v, numerator, denominator)
    dtype = state_dtype(numerator.dtype)
    phi_q, phi_k = query_features(q.to(dtype)), key_features(k.to(dtype))
    wide = numerator.to(dtype)
    out = linear_attention_step(phi_q, phi_k, v, wide, denominator, epsilon=0.0)
    if wide is not numerator:
        numerator.copy_(wide)
    return out


@without_autocast
def taylor_linear_attention_deferred_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    numerator: Float[Tensor, "B H F V"] | Int16[Tensor, "B H 2 F V"],
    denominator: Float[Tensor, "B H F"],
    recent_keys: Float[Tensor, "B R H K"],
    recent_values: Float[Tensor, "B R H V"],
    seen: Int[Tensor, " B"],
) -> Float[Tensor, "B H V"]:
    """The same output; token `seen` of a row goes to ring slot seen mod R, all in place.

    Of a numerator in halves the output sees the upper ones. `seen` itself is not advanced:
    that is the caller's.
    """
    if use_kernels(q):
        from based.ops.taylor_linear_attention.decode import taylor_step_kernel

        return taylor_step_kernel(q, k, v, numerator, denominator, recent_keys, recent_values, seen)
    S = halves.read(numerator) if numerator.dtype == torch.int16 else numerator
    dtype, R = state_dtype(S.dtype), recent_keys.shape[1]
    row, place = torch.arange(q.shape[0], device=q.device), seen % R
    recent_keys[row, place], recent_values[row, place] = k, v
    within = (torch.arange(R, device=q.device) <= place[:, None])[:, None]
    s = torch.einsum("bhk,brhk->bhr", q.to(dtype), recent_keys.to(dtype)) * q.shape[2] ** -0.5
    a = (1 + s + s * s / 2).where(within, 0)
    phi_q = query_features(q.to(dtype))
    above = torch.einsum("bhr,brhv->bhv", a, recent_values.to(dtype))
    above += torch.einsum("bhf,bhfv->bhv", phi_q, S.to(dtype))
    below = a.sum(-1) + torch.einsum("bhf,bhf->bh", phi_q, denominator)
    full = place == R - 1
    if full.any():
        held = torch.where(full, R, 0)
        fold_recent(numerator, denominator, recent_keys, recent_values, held)
    return (above / below[..., None]).to(v.dtype)


@without_autocast
def fold_recent(
    numerator: Float[Tensor, "B H F V"] | Int16[Tensor, "B H 2 F V"],
    denominator: Float[Tensor, "B H F"],
    recent_keys: Float[Tensor, "B R H K"],
    recent_values: Float[Tensor, "B R H V"],
    held: Int[Tensor, " B"],
) -> None:
    """Adds the first `held` keys and values of each row's ring to its state, in place."""
    split = numerator.dtype == torch.int16
    S = halves.join(numerator) if split else numerator
    dtype, slot = state_dtype(S.dtype), torch.arange(recent_keys.shape[1])
    real = (slot.to(held.device) < held[:, None])[:, :, None, None]
    phi_k = key_features(recent_keys.to(dtype)).where(real, 0)
    added = torch.einsum("brhf,brhv->bhfv", phi_k, recent_values.to(dtype))
    S = S.to(dtype) + added
    numerator.copy_(halves.split(S) if split else S)
    denominator += phi_k.sum(1)
