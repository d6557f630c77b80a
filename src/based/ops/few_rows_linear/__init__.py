"""Projections of a decode step of few rows, each with what stands around it, in one kernel."""

from based.ops.few_rows_linear.projections import (
    MOST_ROWS,
    fuses,
    linear,
    linear_convolution,
    linear_swiglu,
    linears,
    norm_linear,
    norm_linear_convolution,
    norm_linear_swiglu,
    norm_linears,
    norm_logits,
    readable,
)
from based.ops.few_rows_linear.residual import Branch, Projected, Residual, embedded, normed

__all__ = [
    "MOST_ROWS",
    "Branch",
    "Projected",
    "Residual",
    "embedded",
    "fuses",
    "linear",
    "linear_convolution",
    "linear_swiglu",
    "linears",
    "norm_linear",
    "norm_linear_convolution",
    "norm_linear_swiglu",
    "norm_linears",
    "norm_logits",
    "normed",
    "readable",
]
