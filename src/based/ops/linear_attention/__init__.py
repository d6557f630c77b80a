"""Normalised linear attention over given features of queries and keys (paper section 3.1)."""

from based.ops.linear_attention.chunked import linear_attention, linear_attention_outputs
from based.ops.linear_attention.step import linear_attention_step

__all__ = ["linear_attention", "linear_attention_outputs", "linear_attention_step"]
