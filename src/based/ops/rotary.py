"""Rotary position embedding, non-interleaved halves (GPT-NeoX form; base 10000).

Angles are computed in float64: in float32 a position of a million would already
turn the fastest pair by a wrong 0.03 radians.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_FREQUENCIES: dict[tuple[str, int, float], Tensor] = {}


def inverse_frequencies(
    head_dim: int,
    fraction: float = 1.0,
    base: float = 10000.0,
    device: torch.device | None = None,
) -> Float[Tensor, " R"]:
    """The R angular frequencies that turn the first 2R components of a head.

    Follows flash-attn, as the official checkpoints do: the rotated width is
    int(head_dim * fraction), and an odd width w still gives (w + 1) / 2
    frequencies base^(-2i/w), so head_dim 70 at fraction 0.5 rotates 36.
    """
    width = int(head_dim * fraction)
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / max(width, 1)
    return base**-exponents


def frequencies_on(
    device: torch.device, head_dim: int, fraction: float = 1.0
) -> Float[Tensor, " R"]:
    """`inverse_frequencies` on a device, made once: a copy there would wait for it.

    `Decoder.compile_blocks` has the compiler take them for constants.
    """
    key = (str(device), head_dim, fraction)
    if key not in _FREQUENCIES:
        # Kept for training too, so never an inference tensor.
        with torch.inference_mode(False):
            _FREQUENCIES[key] = inverse_frequencies(head_dim, fraction).to(device)
    return _FREQUENCIES[key]


def _table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, R]."""
    angles = (positions[..., None] * frequencies)[:, :, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


# Opaque to the compiler, which would compute it anew, in float64, for every head and component.
_table_operator = torch.library.custom_op("based::rotary_table", _table, mutates_args=())


@_table_operator.register_fake
def _table_fake(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, 1, frequencies.shape[0])
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


def rotate(
    x: Float[Tensor, "B T H D"],
    positions: Int[Tensor, "B T"] | Int[Tensor, "1 T"],
    frequencies: Float[Tensor, " R"],
) -> Float[Tensor, "B T H D"]:
    """Turns pair (i, i + R) of every head by positions * frequencies[i]; the rest passes."""
    R = frequencies.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    table = _table_operator if torch.compiler.is_compiling() else _table
    cos, sin = table(positions, frequencies, wide)
    first, second, rest = x.split([R, R, x.shape[-1] - 2 * R], dim=-1)
    first, second = first.to(wide), second.to(wide)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(half.to(x.dtype) for half in turned), rest], dim=-1)
