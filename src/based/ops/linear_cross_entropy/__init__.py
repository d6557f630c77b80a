"""The loss of a language model's head: cross-entropy of hidden @ weight^T, never whole."""

from based.ops.linear_cross_entropy.chunked import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
