"""Cross-entropy of a linear head, for stacked models: the logits never exist whole."""

from based.ops.stacked_cross_entropy.chunked import stacked_cross_entropy

__all__ = ["stacked_cross_entropy"]
