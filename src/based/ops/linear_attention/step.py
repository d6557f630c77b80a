"""One token: the recurrent form."""

import torch
from jaxtyping import Float
from torch import Tensor

from based.ops.linear_attention.reference import EPSILON
from based.ops.precision import without_autocast


@without_autocast
def linear_attention_step(
    q: Float[Tensor, "B H F"],
    k: Float[Tensor, "B H F"],
    v: Float[Tensor, "B H V"],
    numerator: Float[Tensor, "B H F V"],
    denominator: Float[Tensor, "B H F"],
    epsilon: float = EPSILON,
) -> Float[Tensor, "B H V"]:
    """Adds one key's features and value to the state, in place, and reads the query's output."""
    dtype = numerator.dtype
    q, k = q.to(dtype), k.to(dtype)
    flat = numerator.flatten(0, 1)
    flat.baddbmm_(k.flatten(0, 1)[:, :, None], v.to(dtype).flatten(0, 1)[:, None, :])
    denominator += k
    above = torch.einsum("bhf,bhfv->bhv", q, numerator)
    below = torch.einsum("bhf,bhf->bh", q, denominator) + epsilon
    return (above / below[..., None]).to(v.dtype)
