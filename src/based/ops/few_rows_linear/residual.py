"""A residual stream between two half-layers of a decode step, not yet added up and normed."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from based.ops.elementwise import add_rms_norm


class Projected(NamedTuple):
    """A branch before its last projection, which the norm that follows may take part in."""

    x: Float[Tensor, "B C"]
    layer: nn.Linear
    counter: Int[Tensor, " B"] | None

    def parts(self) -> Float[Tensor, "*S B N"]:
        """The branch, perhaps as float32 parts of a sum; the counter is advanced by one."""
        from based.ops.few_rows_linear.tiles import divide, parts_kernel

        division = divide(*self.layer.weight.shape)
        if division is not None:
            weight, bias = self.layer.weight, self.layer.bias
            return parts_kernel(self.x, weight, bias, self.counter, division)
        if self.counter is not None:
            self.counter.add_(1)
        return self.layer(self.x)


class Residual(NamedTuple):
    """A residual stream x + branch, and the RMSNorm that the next branch begins with.

    For whoever computes it. A branch may come as parts of a sum, or before its projection.
    """

    x: Float[Tensor, "B C"]
    branch: Float[Tensor, "*S B C"] | Projected | None
    weight: Float[Tensor, " C"]
    eps: float

    def normed(self) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
        """x + branch, and its norm."""
        branch = self.branch
        given = branch.parts() if isinstance(branch, Projected) else branch
        return add_rms_norm(self.x, given, self.weight, self.eps)
