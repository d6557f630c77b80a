"""One token: the recurrent form."""

from jaxtyping import Float
from torch import Tensor

from based.ops.precision import without_autocast


@without_autocast
def selective_scan_step(
    x: Float[Tensor, "B D"],
    delta: Float[Tensor, "B D"],
    A: Float[Tensor, "D N"],
    b: Float[Tensor, "B N"],
    c: Float[Tensor, "B N"],
    state: Float[Tensor, "B D N"],
) -> Float[Tensor, "B D"]:
    """Decays the state, adds the token, in place, and reads the output."""
    dtype = state.dtype
    delta = delta.to(dtype)
    state *= (delta[..., None] * A.to(dtype)).exp()
    state += (delta * x.to(dtype))[..., None] * b.to(dtype)[:, None, :]
    return (state @ c.to(dtype)[..., None])[..., 0].to(x.dtype)
