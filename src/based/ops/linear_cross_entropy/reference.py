"""The mathematics, with all logits in memory. Every fast path is tested against this."""

from jaxtyping import Float, Int
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Float[Tensor, "T C"], weight: Float[Tensor, "W C"], targets: Int[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """Nats of each target: logsumexp_w(hidden . weight_w) - hidden . weight_target."""
    logits = hidden @ weight.T
    return logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]
