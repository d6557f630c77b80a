"""Causal convolution with a filter as long as the sequence, by the fast Fourier transform."""

from based.ops.long_convolution.fft import long_convolution

__all__ = ["long_convolution"]
