"""Gated short causal convolution, the mixing step of BaseConv (paper section 4.1)."""

from based.ops.gated_short_convolution.operator import gated_short_convolution, has_kernels
from based.ops.gated_short_convolution.shifted import last_inputs, next_past, short_convolution
from based.ops.gated_short_convolution.step import gated_short_convolution_step

__all__ = [
    "gated_short_convolution",
    "gated_short_convolution_step",
    "has_kernels",
    "last_inputs",
    "next_past",
    "short_convolution",
]
