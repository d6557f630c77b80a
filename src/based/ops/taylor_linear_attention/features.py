"""The packed feature map: all monomials of degree at most 2, each once.

With K = feature_dim and s = q.k / sqrt(K),

    1 + s + s^2/2  =  query_features(q) . key_features(k).

A key's features are the bare monomials 1, k_i and k_i k_j; all weights stand
on the query's side. For K = 16 they are powers of two (1, 1/4, 1/32, 1/16), so
they cost no precision in any dtype, and there are 153 features, not 1 + 16 + 256.

Order: the constant, the K linear terms, then the products by diagonal: shift r
holds x_i x_(i+r mod K) for r = 0 .. K/2 (for even K, half of the last one).
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


def num_features(feature_dim: int) -> int:
    """Number of packed features F = 1 + K + K(K+1)/2 (153 for K = 16)."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def key_features(k: Float[Tensor, "... K"]) -> Float[Tensor, "... F"]:
    """Bare monomials of degree 0, 1 and 2."""
    dim = k.shape[-1]
    twice = torch.cat([k, k], dim=-1)
    diagonals = [k * twice[..., shift : shift + dim] for shift in range((dim + 1) // 2)]
    if dim % 2 == 0:
        half = dim // 2
        diagonals.append(k[..., :half] * k[..., half:])
    return torch.cat([torch.ones_like(k[..., :1]), k, *diagonals], dim=-1)


def query_features(q: Float[Tensor, "... K"]) -> Float[Tensor, "... F"]:
    """Monomials with the Taylor weights 1, 1/sqrt(K), 1/(2K) (squares), 1/K (products)."""
    return key_features(q) * _weights(q.shape[-1], q.dtype, q.device)


@lru_cache(maxsize=32)
def _weights(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    products = num_features(dim) - 1 - 2 * dim
    weights = [1.0] + [dim**-0.5] * dim + [0.5 / dim] * dim + [1.0 / dim] * products
    # Cached for training too, so never an inference tensor.
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=dtype, device=device)
