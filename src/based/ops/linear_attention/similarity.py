"""What makes one linear attention differ from another: the weight of a key for a query."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from based.ops.linear_attention.reference import EPSILON


class Similarity(NamedTuple):
    """a(q, k) = phi(q).phi(k): `weights` from vectors, for all pairs, and its features.

    `num_features` is F as a function of the vectors' size; `epsilon` stands under
    the denominator.
    """

    weights: Callable[[Tensor, Tensor], Tensor]
    query_features: Callable[[Tensor], Tensor]
    key_features: Callable[[Tensor], Tensor]
    num_features: Callable[[int], int]
    epsilon: float


def _same(x: Any) -> Any:
    return x


def _product(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


# The product of features that were made before.
PRODUCT = Similarity(_product, _same, _same, _same, EPSILON)
