"""The recurrence that decayed linear attention and the delta rules share, as Triton kernels.

    S_t = (diag(exp(g_t)) + b_t a_t^T) S_(t-1) + k_t v_t^T        o_t = S_t^T q_t

Without a and b it is decayed linear attention, which has its own reference and
PyTorch form, as the delta rules have: `ops/decayed_linear_attention`, `ops/delta_rule`.
"""

from torch import Tensor

from based.ops import kernels

# The largest keys that a program has room for: with a decay a head, and one a channel.
MOST_KEYS, MOST_DECAYING_KEYS = 128, 64


def has_kernel(v: Tensor, key_dim: int, decays: int = 1) -> bool:
    """Whether the kernels take a recurrence with so many decays a head: on a GPU, small keys."""
    most = MOST_KEYS if decays == 1 else MOST_DECAYING_KEYS
    return kernels.use_kernels(v) and key_dim <= most
