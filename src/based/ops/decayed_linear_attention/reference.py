"""The mathematics, a token at a time. Every fast path is tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor


def decayed_linear_attention_reference(
    q: Float[Tensor, "B T #H K"],
    k: Float[Tensor, "B T #H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H #K"],
    state: Float[Tensor, "B H K V"],
    bonus: Float[Tensor, "H K"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T and o_t = S_t^T q_t; q comes scaled.

    With a bonus u (RWKV) o_t = (S_(t-1) + diag(u) k_t v_t^T)^T q_t: the token's
    own key counts u, and the state is read before it decays.
    """
    outs = []
    for t in range(v.shape[1]):
        added = k[:, t, :, :, None] * v[:, t, :, None, :]
        after = log_decay[:, t, :, :, None].exp() * state + added
        seen = after if bonus is None else state + bonus[..., None] * added
        outs.append((q[:, t, :, :, None] * seen).sum(-2))
        state = after
    return torch.stack(outs, dim=1), state
