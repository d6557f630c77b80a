"""Time cut into chunks of L tokens: [B, T, H, D] <-> [B, H, M, L, D]."""

from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional as F


def to_chunks(x: Shaped[Tensor, "B T H D"], chunk: int) -> Shaped[Tensor, "B H M L D"]:
    """Pads with zeros to whole chunks (M of L tokens): a zero key or value leaves a state alone."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)


def from_chunks(x: Shaped[Tensor, "B H M L D"], length: int) -> Shaped[Tensor, "B T H D"]:
    """The first `length` tokens, end to end again."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


def chunk_of(length: int, limit: int) -> int:
    """The power of two that is at least `length`, and at most `limit`."""
    return min(limit, 1 << max(length - 1, 0).bit_length())
