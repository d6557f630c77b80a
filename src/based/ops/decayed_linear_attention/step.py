"""One token: the recurrent form."""

from jaxtyping import Float
from torch import Tensor

from based.ops.precision import without_autocast


@without_autocast
def decayed_linear_attention_step(
    q: Float[Tensor, " B #H K"],
    k: Float[Tensor, " B #H K"],
    v: Float[Tensor, "B H V"],
    log_decay: Float[Tensor, "B H #K"],
    state: Float[Tensor, "B H K V"],
    bonus: Float[Tensor, "H K"] | None = None,
) -> Float[Tensor, "B H V"]:
    """Decays the state, adds one key and value, in place, and reads the query's output."""
    dtype = state.dtype
    added = k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    query = q.to(dtype)[..., None, :]
    if bonus is not None:
        out = query @ (state + bonus.to(dtype)[..., None] * added)
        state.mul_(log_decay.to(dtype).exp()[..., None]).add_(added)
    else:
        state.mul_(log_decay.to(dtype).exp()[..., None]).add_(added)
        out = query @ state
    return out[..., 0, :].to(v.dtype)
