"""The diagonal state-space model in chunks: real matrix products, linear in length, any device.

Inside a chunk the outputs are a Toeplitz matrix of the system's response times the
inputs; what came before is read from the state by powers of the decay.
"""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from based.ops.long_convolution.toeplitz import toeplitz
from based.ops.precision import without_autocast

# A GPU has the products of long chunks for nothing, and states cost it passes; where their
# matrix is no larger than their inputs.
CHUNK, GPU_CHUNK = 64, 256


class _Tables(NamedTuple):
    """What a chunk of L tokens needs; powers[l] = decay^l as real and imaginary parts."""

    response: Float[Tensor, "H L L"]
    read: Float[Tensor, "H L S 2"]
    powers: Float[Tensor, "L1 H S 2"]


def _tables(
    decay: Complex[Tensor, "H S"],
    output: Complex[Tensor, "H S"],
    skip: Float[Tensor, " H"],
    L: int,
) -> _Tables:
    exponent = torch.arange(L + 1, device=decay.device)
    powers = (exponent[:, None, None] * decay.log()).exp()
    read = 2 * output * powers
    lags = read[:L].sum(-1).real.T
    # At lag 0 the skip connection costs no pass over the inputs.
    response = toeplitz(torch.cat([lags[:, :1] + skip[:, None], lags[:, 1:]], dim=1))
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
    skip: Float[Tensor, " H"],
    state: Float[Tensor, "B H E S 2"] | None = None,
    final_state: bool = True,
) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B H E S 2"] | None]:
    """Outputs and the final state, as `reference.py` defines them.

    Zeros are the default state. Without `final_state` None stands for it, and what it
    alone takes is not computed.
    """
    B, T, H, E = x.shape
    if T == 0:
        if state is None and final_state:
            state = x.new_zeros(B, H, E, decay.shape[1], 2)
        return x, state if final_state else None
    chunk = min(GPU_CHUNK if x.is_cuda and B * E >= GPU_CHUNK else CHUNK, T)
    tables, outs = _tables(decay, output, skip, chunk), []
    # The gradient of a split is a copy, even of one piece.
    pieces = x.split(chunk, dim=1) if chunk < T else (x,)
    for number, piece in enumerate(pieces, 1):
        L = piece.shape[1]
        # In this order the product has its tokens last in memory, as inputs best have.
        out = torch.einsum("bjhe,htj->bthe", piece, tables.response[:, :L, :L])
        if state is not None:
            out = out + torch.einsum("htsc,bhesc->bthe", tables.read[:, :L], state)
        outs.append(out)
        if number < len(pieces) or final_state:
            state = _after(piece, tables.powers[: L + 1], state)
    out = torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]
    return out, state if final_state else None


def _after(
    piece: Float[Tensor, "B L H E"],
    powers: Float[Tensor, "L1 H S 2"],
    state: Float[Tensor, "B H E S 2"] | None,
) -> Float[Tensor, "B H E S 2"]:
    """The state after a chunk."""
    added = torch.einsum("jhsc,bjhe->bhesc", powers[:-1].flip(0), piece)
    return added if state is None else _times(powers[-1][:, None], state) + added


def _times(a: Float[Tensor, "... 2"], b: Float[Tensor, "... 2"]) -> Float[Tensor, "... 2"]:
    """The complex product, of real and imaginary parts."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], dim=-1)
