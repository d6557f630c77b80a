"""The diagonal state-space model in chunks: real matrix products, linear in length, any device.

Inside a chunk the outputs are a Toeplitz matrix of the system's response times the
inputs; what came before is read from the state by powers of the decay.
"""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from based.ops.precision import without_autocast

CHUNK = 64


class _Tables(NamedTuple):
    """What a chunk of L tokens needs; powers[l] = decay^l as real and imaginary parts."""

    response: Float[Tensor, "H L L"]
    read: Float[Tensor, "H L S 2"]
    powers: Float[Tensor, "L1 H S 2"]


def _tables(decay: Complex[Tensor, "H S"], output: Complex[Tensor, "H S"], L: int) -> _Tables:
    exponent = torch.arange(L + 1, device=decay.device)
    powers = (exponent[:, None, None] * decay.log()).exp()
    read = 2 * output * powers
    lag = exponent[:L, None] - exponent[:L]
    response = read.sum(-1).real.T[:, lag.clamp(min=0)].tril()
    # Re(a b) is the dot product of conj(a) and b as vectors of two real numbers.
    return _Tables(
        response,
        torch.view_as_real(read[1:].conj().resolve_conj()).transpose(0, 1),
        torch.view_as_real(powers),
    )


@without_autocast
def diagonal_state_space(
    x: Float[Tensor, "B T H E"],
    decay: Complex[Tensor, "H S"],
    output: Complex[Tensor, "H S"],
    state: Float[Tensor, "B H E S 2"] | None = None,
) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B H E S 2"]]:
    """Outputs and the final state, as `reference.py` defines them; zeros are the default state."""
    B, T, H, E = x.shape
    if state is None:
        state = x.new_zeros(B, H, E, decay.shape[1], 2)
    if T == 0:
        return x, state
    tables, outs = _tables(decay, output, min(CHUNK, T)), []
    for piece in x.split(CHUNK, dim=1):
        L = piece.shape[1]
        inside = torch.einsum("htj,bjhe->bthe", tables.response[:, :L, :L], piece)
        outs.append(inside + torch.einsum("htsc,bhesc->bthe", tables.read[:, :L], state))
        ages = tables.powers[:L].flip(0)
        added = torch.einsum("jhsc,bjhe->bhesc", ages, piece)
        state = _times(tables.powers[L][:, None], state) + added
    return torch.cat(outs, dim=1), state


def _times(a: Float[Tensor, "... 2"], b: Float[Tensor, "... 2"]) -> Float[Tensor, "... 2"]:
    """The complex product, of real and imaginary parts."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], dim=-1)
