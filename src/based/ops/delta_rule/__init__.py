"""Delta rules: a state that corrects what it holds before it adds (DeltaNet, arXiv 2406.06484).

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T       `delta_rule`
    S_t = (diag(exp(g_t)) + b_t a_t^T) S_(t-1) + k_t v_t^T     `generalized_delta_rule`

and o_t = S_t^T q_t. DeltaNet has g = 0, Gated DeltaNet one g a head; RWKV-7's
generalised rule has one a channel, and directions a and b of its own.
"""

from based.ops.delta_rule.chunked import delta_rule, generalized_delta_rule
from based.ops.delta_rule.step import delta_rule_step, generalized_delta_rule_step

__all__ = [
    "delta_rule",
    "delta_rule_step",
    "generalized_delta_rule",
    "generalized_delta_rule_step",
]
