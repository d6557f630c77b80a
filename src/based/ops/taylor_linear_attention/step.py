"""One token: the recurrent form."""

from jaxtyping import Float
from torch import Tensor

from based.ops.linear_attention import linear_attention_step
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
    phi_q, phi_k = query_features(q.to(dtype)), key_features(k.to(dtype))
    return linear_attention_step(phi_q, phi_k, v, numerator, denominator, epsilon=0.0)
