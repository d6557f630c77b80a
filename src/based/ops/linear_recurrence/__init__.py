"""The recurrence that decayed linear attention and the delta rules share, as Triton kernels.

    S_t = (diag(exp(g_t)) + b_t a_t^T) S_(t-1) + k_t v_t^T        o_t = S_t^T q_t

Without a and b it is decayed linear attention, which has its own reference and
PyTorch form, as the delta rules have: `ops/decayed_linear_attention`, `ops/delta_rule`.
"""

from based.ops.linear_recurrence.operator import has_kernel, linear_recurrence

__all__ = ["has_kernel", "linear_recurrence"]
