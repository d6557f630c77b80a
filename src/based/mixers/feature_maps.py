"""The feature maps of linear attention that the paper compares (section 3.2, Figure 3).

Each maps a head's `[K]` vector, K = feature_dim, to F features, the same for queries
and keys. They follow the paper's code, its constants included; queries are not scaled.
"""

from math import pi
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from based.errors import BasedError
from based.mixers.base import at_least_one
from based.ops.precision import without_autocast


class FeatureMap(nn.Module):
    """The identity, and the base of the others. Of both signs: the denominator can vanish."""

    #: Longest sequence it is defined for, if there is one.
    max_length: int | None = None

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.num_features = feature_dim

    def forward(
        self, x: Float[Tensor, "B T H K"], position: Int[Tensor, "#B T"]
    ) -> Float[Tensor, "B T H F"]:
        """Features of tokens that stand at `position` (from 0) in their sequences."""
        return x


class ReLU(FeatureMap):
    """max(x, 1e-12): a query with no positive component weighs all keys alike."""

    floor: ClassVar[float] = 1e-12

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return F.relu(x).clamp(min=self.floor)


class PosELU(FeatureMap):
    """1 + elu(x): e^x below zero, 1 + x above (Katharopoulos et al. 2020)."""

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return 1 + F.elu(x)


class Square(FeatureMap):
    """x^2, a component at a time."""

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return x.square()


class AllPoly(FeatureMap):
    """((W1 x)^2 + W2 x^2) / sqrt(2), W1 and W2 learned and shared by queries and keys."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.products = nn.Linear(feature_dim, feature_dim, bias=False)
        self.squares = nn.Linear(feature_dim, feature_dim, bias=False)

    @without_autocast
    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        products = F.linear(x, self.products.weight.to(x.dtype))
        squares = F.linear(x.square(), self.squares.weight.to(x.dtype))
        return (products.square() + squares) * 2**-0.5


class CosFormer(FeatureMap):
    """[r sin a, r cos a], r = relu(x), a = pi/2 (t + 1) / max_length (Qin et al. 2022).

    So that a key t tokens back counts cos(pi/2 t / max_length) times r.r. The paper's
    code divides by each batch's own length instead, which looks ahead.
    """

    def __init__(self, feature_dim: int, max_length: int) -> None:
        super().__init__(feature_dim)
        at_least_one(max_length=max_length)
        self.num_features, self.max_length = 2 * feature_dim, max_length

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        assert self.max_length is not None
        angle = ((position + 1).double() * (pi / 2 / self.max_length))[..., None, None]
        x = F.relu(x)
        return torch.cat([x * angle.sin().to(x.dtype), x * angle.cos().to(x.dtype)], dim=-1)


class Performer(FeatureMap):
    """exp(w.y - |y|^2 / 2) / sqrt(F), y = x / K^(1/4), for F fixed random w (Choromanski 2021).

    The w are rows of random rotations, of length sqrt(K / F) as in the paper's code;
    they are a buffer and so part of every checkpoint.
    """

    def __init__(self, feature_dim: int, num_features: int = 256) -> None:
        super().__init__(feature_dim)
        at_least_one(num_features=num_features)
        self.num_features = num_features
        blocks = -(-num_features // feature_dim)
        rotations = torch.linalg.qr(torch.randn(blocks, feature_dim, feature_dim)).Q
        directions = rotations.flatten(0, 1)[:num_features] * (feature_dim / num_features) ** 0.5
        self.register_buffer("directions", directions.contiguous())

    @without_autocast
    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        assert isinstance(self.directions, Tensor)
        y = x * x.shape[-1] ** -0.25
        exponent = y @ self.directions.to(x.dtype).T - y.square().sum(-1, keepdim=True) / 2
        return exponent.exp() * self.num_features**-0.5


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "identity": FeatureMap,
    "relu": ReLU,
    "pos_elu": PosELU,
    "square": Square,
    "all_poly": AllPoly,
    "cosformer": CosFormer,
    "performer": Performer,
}


def build_feature_map(name: str, feature_dim: int, **options: int) -> FeatureMap:
    """The named map; `options` are its class's keyword arguments."""
    if name not in FEATURE_MAPS:
        raise BasedError(f"no feature map is named {name!r}; there are {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[name](feature_dim, **options)
