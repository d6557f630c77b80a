"""Linear attention whose state decays: Mamba-2, GLA, RWKV-5 and others are this recurrence.

    S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T        o_t = S_t^T q_t

The decay is one number a head (Mamba-2) or one a channel of the key (GLA, RWKV-5).
"""

from based.ops.decayed_linear_attention.chunked import decayed_linear_attention
from based.ops.decayed_linear_attention.step import decayed_linear_attention_step

__all__ = ["decayed_linear_attention", "decayed_linear_attention_step"]
