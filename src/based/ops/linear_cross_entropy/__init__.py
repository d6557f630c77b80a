"""Cross-entropy of a linear head, for stacked models: the logits never exist whole."""

from based.ops.linear_cross_entropy.chunked import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
