"""Linear layers of stacked models, with weight gradients that fill a GPU."""

from based.ops.stacked_linear.split import stacked_linear

__all__ = ["stacked_linear"]
