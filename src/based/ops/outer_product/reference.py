"""The mathematics, in PyTorch. The kernels are tested against this."""

from jaxtyping import Float
from torch import Tensor


def outer_product_reference(
    a: Float[Tensor, "... C"], b: Float[Tensor, "... C"], heads: int
) -> Float[Tensor, "... H D D"]:
    """m_ij = a_i b_j in every head of D = C / H channels."""
    a, b = (x.unflatten(-1, (heads, -1)) for x in (a, b))
    return a[..., :, None] * b[..., None, :]


def vector_matrix_product_reference(
    a: Float[Tensor, "... C"], m: Float[Tensor, "... H D D"]
) -> Float[Tensor, "... C"]:
    """y_j = sum_i a_i m_ij in every head."""
    return (a.unflatten(-1, m.shape[-3:-1])[..., None] * m).sum(-2).flatten(-2)
