"""Gated DeltaNet: the delta rule on a state that decays (arXiv 2412.06464)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from based.mixers.base import Mixer, TensorSpec, at_least_one, split_heads
from based.mixers.parts import ShortConvolution, head_norm, time_step_bias, unit
from based.mixers.state import State
from based.ops.delta_rule import delta_rule, delta_rule_step
from based.ops.precision import state_dtype


class GatedDeltaNet(Mixer):
    """S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T, o_t = S_t^T q_t.

    DeltaNet with a decay a head, log a_t = -exp(A_log) softplus(projection of x_t),
    values `expand_v` times as wide as keys, and (`output_gate`) norm(o) silu(gate)
    before out_proj. head_dim is the keys', hidden_size / num_heads if not given. The
    state is S in float32, num_heads * head_dim^2 * expand_v numbers, and the
    convolutions' last inputs.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand_v: int = 2,
        conv_size: int = 4,
        output_gate: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.expand_v = num_heads, expand_v
        self.head_dim = split_heads(hidden_size, num_heads) if head_dim is None else head_dim
        at_least_one(num_heads=num_heads, head_dim=self.head_dim, expand_v=expand_v)
        keys = num_heads * self.head_dim
        self.split = (keys, keys, keys * expand_v)
        self.qkv_proj = nn.Linear(hidden_size, sum(self.split), bias=False)
        self.conv = ShortConvolution(sum(self.split), conv_size)
        self.beta_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.decay_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1e-3, 16).log())
        self.dt_bias = nn.Parameter(time_step_bias(num_heads))
        values = keys * expand_v
        self.gate_proj = nn.Linear(hidden_size, values, bias=False) if output_gate else None
        self.norm_weight = nn.Parameter(torch.ones(self.head_dim * expand_v))
        self.out_proj = nn.Linear(values, hidden_size, bias=False)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        shape = (self.num_heads, self.head_dim, self.head_dim * self.expand_v)
        return {
            "conv": self.conv.state_spec(),
            "memory": TensorSpec(shape, state_dtype(dtype)),
        }

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        before, memory = (None, None) if state is None else (state["conv"], state["memory"])
        qkv, conv = self.conv(self.qkv_proj(x), before)
        out, memory = delta_rule(*self._inputs(x, qkv), memory)
        return self._output(out, x), None if conv is None else State(conv=conv, memory=memory)

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        qkv = self.conv.step(self.qkv_proj(x), state["conv"])
        return self._output(delta_rule_step(*self._inputs(x, qkv), state["memory"]), x)

    def _inputs(
        self, x: Float[Tensor, "... C"], qkv: Float[Tensor, "... D"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, beta and the log decays, by heads."""
        parts = qkv.split(self.split, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in parts)
        wide = state_dtype(x.dtype)
        step = F.softplus(self.decay_proj(x).to(wide) + self.dt_bias.to(wide))
        log_decay = -self.A_log.to(wide).exp() * step
        q, k, beta = unit(q) * self.head_dim**-0.5, unit(k), self.beta_proj(x).sigmoid()
        return q, k, v, beta, log_decay

    def _output(self, out: Tensor, x: Tensor) -> Tensor:
        out = head_norm(out, self.norm_weight)
        return self.out_proj(out if self.gate_proj is None else out * F.silu(self.gate_proj(x)))
