"""The mathematics, in quadratic time. Every fast path is tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor

# Under every denominator, as in the paper's code: a query whose features are all zero gets zeros.
EPSILON = 1e-12


def linear_attention_reference(
    q: Float[Tensor, "B T H F"],
    k: Float[Tensor, "B T H F"],
    v: Float[Tensor, "B T H V"],
    numerator: Float[Tensor, "B H F V"],
    denominator: Float[Tensor, "B H F"],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H F V"], Float[Tensor, "B H F"]]:
    """o_t = sum_i a_ti v_i / (sum_i a_ti + 1e-12) over i <= t, with a_ti = q_t . k_i.

    q and k are features already: phi(q), phi(k). The state (S, z) is what earlier
    tokens left: S = sum_i k_i v_i^T and z = sum_i k_i. Features of both signs can
    bring the denominator near zero, and the output is then as large as that makes it.
    """
    a = torch.tril(torch.einsum("bthf,bihf->bhti", q, k))
    above = torch.einsum("bhti,bihv->bthv", a, v) + torch.einsum("bthf,bhfv->bthv", q, numerator)
    below = torch.einsum("bhti->bth", a) + torch.einsum("bthf,bhf->bth", q, denominator)
    numerator = numerator + torch.einsum("bthf,bthv->bhfv", k, v)
    denominator = denominator + torch.einsum("bthf->bhf", k)
    return above / (below + EPSILON)[..., None], numerator, denominator
