"""The mathematics, token by token. Every fast path is tested against this."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def diagonal_state_space_reference(
    x: Float[Tensor, "B T H E"],
    decay: Complex[Tensor, "H S"],
    output: Complex[Tensor, "H S"],
    skip: Float[Tensor, " H"],
    state: Float[Tensor, "B H E S 2"],
) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B H E S 2"]]:
    """y_t = 2 Re(sum_n output_n s_tn) + skip x_t, s_t = decay s_(t-1) + x_t, for each of E inputs.

    One system a head, of S conjugate pairs, of which one each is kept; the state
    is the s of the last token, real and imaginary parts beside each other.
    Returns the outputs and the state after the last token.
    """
    s, outs = torch.view_as_complex(state), []
    for t in range(x.shape[1]):
        s = decay[:, None] * s + x[:, t, :, :, None]
        read = 2 * torch.einsum("hs,bhes->bhe", output, s).real
        outs.append(read + skip[:, None] * x[:, t])
    return torch.stack(outs, dim=1), torch.view_as_real(s)
