"""A short causal convolution with what follows it: a SiLU, or a gate and the input itself."""

from based.ops.short_convolution.operator import activated_convolution

__all__ = ["activated_convolution"]
