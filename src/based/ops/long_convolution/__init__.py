"""Causal convolution with a filter as long as the sequence: products, or Fourier transforms."""

from based.ops.long_convolution.operator import long_convolution

__all__ = ["long_convolution"]
