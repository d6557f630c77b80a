"""Taylor linear attention in chunks: time and memory linear in length, any device."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from based.ops.linear_attention.chunked import outputs, scan
from based.ops.linear_attention.similarity import Similarity
from based.ops.precision import without_autocast
from based.ops.taylor_linear_attention.features import key_features, num_features, query_features


@without_autocast
def taylor_linear_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    numerator: Float[Tensor, "N H F V"] | None = None,
    denominator: Float[Tensor, "N H F"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H F V"], Float[Tensor, "N H F"]]:
    """Outputs in v's dtype and the final state, as `reference.py` defines them.

    The state starts at zero when it is not given. It has one row a sequence:
    N = B, or the number of packed sequences (then B = 1). Accumulation and
    state are float32 (float64 for float64 inputs).
    """
    return scan(TAYLOR, q, k, v, numerator, denominator, cu_seqlens)


@without_autocast
def taylor_linear_attention_outputs(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """What training needs: the outputs from an empty state, and no state after."""
    return outputs(TAYLOR, q, k, v, cu_seqlens)


def _weights(q: Float[Tensor, "... L K"], k: Float[Tensor, "... L K"]) -> Float[Tensor, "... L L"]:
    """1 + s + s^2 / 2 with s = q.k / sqrt(K)."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.addcmul(s + 1, s, s, value=0.5)


# a >= 1/2, so no epsilon.
TAYLOR = Similarity(_weights, query_features, key_features, num_features, epsilon=0.0)
