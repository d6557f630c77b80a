"""RWKV-5, Eagle: linear attention with a constant decay a channel (arXiv 2404.05892)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from based.mixers.base import Mixer, TensorSpec
from based.mixers.parts import head_layer_norm, heads_of, token_shift
from based.mixers.state import State
from based.ops.decayed_linear_attention import (
    decayed_linear_attention,
    decayed_linear_attention_step,
)
from based.ops.precision import state_dtype


class RWKV5(Mixer):
    """S_t = diag(w) S_(t-1) + k_t v_t^T, o_t = (S_(t-1) + diag(u) k_t v_t^T)^T r_t.

    r, k, v and the gate are projections of x_t moved towards x_(t-1) by a learned
    share a channel; w = exp(-exp(decay)); out_proj(norm(o) silu(gate)). This is the
    paper's time mixing; a decoder's MLP takes the place of its channel mixing. The
    state is S in float32, hidden_size * head_dim numbers, and the last token.
    """

    def __init__(self, hidden_size: int, head_dim: int = 64) -> None:
        super().__init__()
        self.head_dim, self.num_heads = head_dim, heads_of(hidden_size, head_dim)
        # Initial values are those of the official code's first layer.
        place = torch.arange(hidden_size) / hidden_size
        self.shift = nn.Parameter(1 - torch.stack([place**0.5, place, place, place**0.5]))
        ramp = torch.linspace(0, 1, hidden_size)
        self.decay = nn.Parameter((-6 + 5 * ramp**0.7).unflatten(0, (-1, head_dim)))
        zigzag = 0.1 * ((torch.arange(hidden_size) + 1) % 3 - 1)
        self.bonus = nn.Parameter(zigzag.unflatten(0, (-1, head_dim)))
        self.r_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(hidden_size))
        self.norm_bias = nn.Parameter(torch.zeros(hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        shape = (self.num_heads, self.head_dim, self.head_dim)
        return {
            "last": TensorSpec((self.shift.shape[1],)),
            "memory": TensorSpec(shape, state_dtype(dtype)),
        }

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        last, memory = (None, None) if state is None else (state["last"], state["memory"])
        inputs, gate = self._project(x, token_shift(x, last))
        out, memory = decayed_linear_attention(*inputs, memory, self.bonus)
        after = None if last is None else State(last=x[:, -1].to(last.dtype), memory=memory)
        return self._output(out, gate), after

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        inputs, gate = self._project(x, state["last"])
        out = decayed_linear_attention_step(*inputs, state["memory"], self.bonus)
        state["last"].copy_(x)
        return self._output(out, gate)

    def _project(
        self, x: Float[Tensor, "... C"], previous: Float[Tensor, "... C"]
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """r, k, v and log w, by heads; and the gate."""
        mixed = (torch.lerp(x, previous, share) for share in self.shift.to(x.dtype))
        layers = (self.r_proj, self.k_proj, self.v_proj, self.gate_proj)
        r, k, v, gate = (layer(y) for layer, y in zip(layers, mixed, strict=True))
        r, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (r, k, v))
        log_decay = -self.decay.to(state_dtype(r.dtype)).exp()
        return (r, k, v, log_decay.expand(r.shape)), gate

    def _output(self, out: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(head_layer_norm(out, self.norm_weight, self.norm_bias) * F.silu(gate))
