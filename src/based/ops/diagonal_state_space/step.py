"""One token: the recurrent form."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def diagonal_state_space_step(
    x: Float[Tensor, "B H E"],
    decay: Complex[Tensor, "H S"],
    output: Complex[Tensor, "H S"],
    skip: Float[Tensor, " H"],
    state: Float[Tensor, "B H E S 2"],
) -> Float[Tensor, "B H E"]:
    """Moves the state on by one input, in place, and reads the output; x in the state's dtype."""
    s = torch.view_as_complex(state)
    s.mul_(decay[:, None]).add_(x[..., None])
    return 2 * torch.einsum("hs,bhes->bhe", output, s).real + skip[:, None] * x
