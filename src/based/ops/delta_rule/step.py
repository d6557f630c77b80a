"""One token: the recurrent forms. Both change the state in place."""

from jaxtyping import Float
from torch import Tensor

from based.ops.precision import without_autocast


@without_autocast
def delta_rule_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    beta: Float[Tensor, "B H"],
    log_decay: Float[Tensor, "B H"] | None,
    state: Float[Tensor, "B H K V"],
) -> Float[Tensor, "B H V"]:
    """Fades the state, corrects its value for k, and reads the query's output."""
    dtype = state.dtype
    key = k.to(dtype)[..., None, :]
    if log_decay is not None:
        state *= log_decay.to(dtype).exp()[..., None, None]
    moved = beta.to(dtype)[..., None, None] * (v.to(dtype)[..., None, :] - key @ state)
    state += key.mT * moved
    return (q.to(dtype)[..., None, :] @ state)[..., 0, :].to(v.dtype)


@without_autocast
def generalized_delta_rule_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    a: Float[Tensor, "B H K"],
    b: Float[Tensor, "B H K"],
    log_decay: Float[Tensor, "B H K"],
    state: Float[Tensor, "B H K V"],
) -> Float[Tensor, "B H V"]:
    """One update of the diagonal-plus-rank-one state, and the query's output."""
    dtype = state.dtype
    held = a.to(dtype)[..., None, :] @ state
    state *= log_decay.to(dtype).exp()[..., None]
    state += b.to(dtype)[..., None] * held + k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    return (q.to(dtype)[..., None, :] @ state)[..., 0, :].to(v.dtype)
