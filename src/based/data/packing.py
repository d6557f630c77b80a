"""Documents in a batch: where one ends and the next begins."""

from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F


def document_bounds(tokens: Int[Tensor, "B T"], end_of_text: int) -> Int[Tensor, " E"]:
    """`cu_seqlens` of the rows end to end, every document a sequence of its own.

    A document begins at the end-of-text token before it, as a generated one does, so
    its first token is predicted from nothing but that. Bounds are repeated at the end
    to a power of two, so that batches come in few shapes.
    """
    begins = tokens == end_of_text
    begins[:, 0] = True
    bounds = begins.flatten().nonzero()[:, 0]
    count = 1 << len(bounds).bit_length()
    return F.pad(bounds, (0, count - len(bounds)), value=tokens.numel())
