"""Second-order Taylor linear attention (paper section 4.1, equation 4)."""

from based.ops.precision import state_dtype
from based.ops.taylor_linear_attention.features import num_features
from based.ops.taylor_linear_attention.halves import join as join_halves
from based.ops.taylor_linear_attention.halves import split as split_halves
from based.ops.taylor_linear_attention.operator import (
    has_kernels,
    taylor_linear_attention,
    taylor_linear_attention_outputs,
)
from based.ops.taylor_linear_attention.step import (
    fold_recent,
    taylor_linear_attention_deferred_step,
    taylor_linear_attention_step,
)

__all__ = [
    "fold_recent",
    "has_kernels",
    "join_halves",
    "num_features",
    "split_halves",
    "state_dtype",
    "taylor_linear_attention",
    "taylor_linear_attention_deferred_step",
    "taylor_linear_attention_outputs",
    "taylor_linear_attention_step",
]
