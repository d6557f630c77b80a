"""The mathematics, a token at a time. Every fast path is tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor


def delta_rule_reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """The state fades, and the value it holds for k moves by beta towards v; q comes scaled."""
    outs = []
    for t in range(v.shape[1]):
        state = log_decay[:, t, :, None, None].exp() * state
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        moved = beta[:, t, :, None] * (v[:, t] - held)
        state = state + k[:, t, :, :, None] * moved[:, :, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outs, dim=1), state


def generalized_delta_rule_reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    log_decay: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """S_t = (diag(exp(log_decay_t)) + b_t a_t^T) S_(t-1) + k_t v_t^T; o_t = S_t^T q_t."""
    outs = []
    for t in range(v.shape[1]):
        held = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        state = log_decay[:, t, :, :, None].exp() * state
        state = state + b[:, t, :, :, None] * held[:, :, None, :]
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outs, dim=1), state
