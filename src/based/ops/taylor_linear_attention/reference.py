"""The mathematics, in quadratic time. Every fast path is tested against this."""

import torch
from jaxtyping import Float
from torch import Tensor

from based.ops.taylor_linear_attention.features import key_features, query_features


def taylor_linear_attention_reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    numerator: Float[Tensor, "B H F V"],
    denominator: Float[Tensor, "B H F"],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H F V"], Float[Tensor, "B H F"]]:
    """Equation 4: o_t = sum_i a_ti v_i / sum_i a_ti over i <= t, a = 1 + s + s^2/2.

    s_ti = q_t . k_i / sqrt(K). The state (S, z) is what earlier tokens left:
    S = sum_i phi(k_i) v_i^T and z = sum_i phi(k_i). a >= 1/2, so no epsilon.
    Returns the outputs and the state after the last token.
    """
    s = torch.einsum("bthk,bihk->bhti", q, k) * q.shape[-1] ** -0.5
    a = torch.tril(1 + s + s**2 / 2)
    phi_q, phi_k = query_features(q), key_features(k)
    above = torch.einsum("bhti,bihv->bthv", a, v) + torch.einsum(
        "bthf,bhfv->bthv", phi_q, numerator
    )
    below = torch.einsum("bhti->bth", a) + torch.einsum("bthf,bhf->bth", phi_q, denominator)
    numerator = numerator + torch.einsum("bthf,bthv->bhfv", phi_k, v)
    denominator = denominator + torch.einsum("bthf->bhf", phi_k)
    return above / below[..., None], numerator, denominator
