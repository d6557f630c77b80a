"""DeltaNet: linear attention that corrects what it holds (arXiv 2406.06484)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from based.mixers.base import Mixer, TensorSpec, split_heads
from based.mixers.parts import ShortConvolution, head_norm, unit
from based.mixers.state import State
from based.ops.delta_rule import delta_rule, delta_rule_step
from based.ops.precision import state_dtype


class DeltaNet(Mixer):
    """S_t = (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T, o_t = S_t^T q_t; out_proj(norm(o)).

    q, k and v go through short convolutions with silu; q and k have unit length,
    and b_t = sigmoid of a projection. The state is S in float32, hidden_size^2 /
    num_heads numbers, and the convolutions' last inputs.
    """

    def __init__(self, hidden_size: int, num_heads: int = 4, conv_size: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, split_heads(hidden_size, num_heads)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.conv = ShortConvolution(3 * hidden_size, conv_size)
        self.beta_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(self.head_dim))
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        shape = (self.num_heads, self.head_dim, self.head_dim)
        return {
            "conv": self.conv.state_spec(),
            "memory": TensorSpec(shape, state_dtype(dtype)),
        }

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        before, memory = (None, None) if state is None else (state["conv"], state["memory"])
        qkv, conv = self.conv(self.qkv_proj(x), before)
        out, memory = delta_rule(*self._inputs(x, qkv), None, memory)
        return self._output(out), None if conv is None else State(conv=conv, memory=memory)

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        qkv = self.conv.step(self.qkv_proj(x), state["conv"])
        return self._output(delta_rule_step(*self._inputs(x, qkv), None, state["memory"]))

    def _inputs(
        self, x: Float[Tensor, "... C"], qkv: Float[Tensor, "... D"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and beta, by heads."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return unit(q) * self.head_dim**-0.5, unit(k), v, self.beta_proj(x).sigmoid()

    def _output(self, out: Tensor) -> Tensor:
        return self.out_proj(head_norm(out, self.norm_weight))
