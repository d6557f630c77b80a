"""Mamba-2's output: a skip, a SiLU gate and an RMSNorm in one pass."""

from based.ops.gated_norm.operator import gated_norm

__all__ = ["gated_norm"]
