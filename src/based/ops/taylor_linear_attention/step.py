"""One token: the recurrent form."""

import torch
from jaxtyping import Float
from torch import Tensor

from based.ops.precision import without_autocast
from based.ops.taylor_linear_attention.features import key_features, query_features


@without_autocast
def taylor_linear_attention_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    numerator: Float[Tensor, "B H F V"],
    denominator: Float[Tensor, "B H F"],
) -> Float[Tensor, "B H V"]:
    """Adds one key and value to the state, in place, and reads the query's output."""
    dtype = numerator.dtype
    phi_k, phi_q = key_features(k.to(dtype)), query_features(q.to(dtype))
    flat = numerator.flatten(0, 1)
    flat.baddbmm_(phi_k.flatten(0, 1)[:, :, None], v.to(dtype).flatten(0, 1)[:, None, :])
    denominator += phi_k
    above = torch.einsum("bhf,bhfv->bhv", phi_q, numerator)
    below = torch.einsum("bhf,bhf->bh", phi_q, denominator)
    return (above / below[..., None]).to(v.dtype)
