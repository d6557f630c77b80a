"""GLA: gated linear attention, a decay a channel from the input (arXiv 2312.06635)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from based.mixers.base import Mixer, TensorSpec, at_least_one, split_heads
from based.mixers.parts import head_norm
from based.mixers.state import State
from based.ops.decayed_linear_attention import (
    decayed_linear_attention,
    decayed_linear_attention_step,
)
from based.ops.precision import state_dtype


class GatedLinearAttention(Mixer):
    """S_t = diag(a_t) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t; out_proj(norm(o) silu(gate)).

    log a_t = logsigmoid(low-rank projection of x_t) / 16, one for each of a key's
    channels. Keys are half as wide as values. The state is S in float32:
    hidden_size^2 / (2 num_heads) numbers.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        decay_rank: int = 16,
        decay_normalizer: float = 16.0,
    ) -> None:
        super().__init__()
        at_least_one(decay_rank=decay_rank)
        self.num_heads, self.decay_normalizer = num_heads, decay_normalizer
        self.head_dim, self.key_dim = split_heads(hidden_size, num_heads), hidden_size // 2
        self.head_key_dim = split_heads(self.key_dim, num_heads)
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.decay_down = nn.Linear(hidden_size, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, self.key_dim)
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(self.head_dim))
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        shape = (self.num_heads, self.head_key_dim, self.head_dim)
        return {"memory": TensorSpec(shape, state_dtype(dtype))}

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        before = None if state is None else state["memory"]
        out, memory = decayed_linear_attention(*self._project(x), before)
        return self._output(out, x), None if state is None else State(memory=memory)

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        return self._output(decayed_linear_attention_step(*self._project(x), state["memory"]), x)

    def _project(self, x: Float[Tensor, "... C"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logit = self.decay_up(self.decay_down(x))
        log_decay = F.logsigmoid(logit.to(state_dtype(logit.dtype))) / self.decay_normalizer
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x), log_decay)
        q, k, v, log_decay = (y.unflatten(-1, (self.num_heads, -1)) for y in projections)
        return q * self.head_key_dim**-0.5, k, v, log_decay

    def _output(self, out: Tensor, x: Tensor) -> Tensor:
        return self.out_proj(head_norm(out, self.norm_weight) * F.silu(self.gate_proj(x)))
