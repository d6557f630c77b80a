"""Full causal softmax attention: the Transformer++ baseline's mixer."""

from based.ops.softmax_attention.sdpa import softmax_attention

__all__ = ["softmax_attention"]
