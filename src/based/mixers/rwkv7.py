"""RWKV-7, Goose: a generalised delta rule with a decay a channel (arXiv 2503.14456)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from based.mixers.base import Mixer, TensorSpec, at_least_one
from based.mixers.parts import head_layer_norm, heads_of, token_shift
from based.mixers.state import State
from based.ops.delta_rule import generalized_delta_rule, generalized_delta_rule_step
from based.ops.precision import state_dtype

# exp(-1/2): no channel decays faster than exp(-0.61) a token.
STRONGEST_DECAY = 0.6065306597126334


class RWKV7(Mixer):
    """S_t = (diag(w_t) - (a_t h_t) h_t^T) S_(t-1) + k_t v_t^T, o_t = S_t^T r_t.

    h is the unit removal key, a the in-context learning rate, w the decay, all of
    x_t moved towards x_(t-1) by a learned share a channel; w, a and the gate are
    low-rank. out_proj((norm(o) + (r_t . rho k_t) v_t) gate). This is the paper's
    time mixing; a decoder's MLP takes the place of its channel mixing, and values
    are the layer's own, without the paper's residual from the first layer's. The
    state is S in float32, hidden_size * head_dim numbers, and the last token.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int = 64,
        decay_rank: int = 64,
        rate_rank: int = 64,
        gate_rank: int = 128,
    ) -> None:
        super().__init__()
        at_least_one(decay_rank=decay_rank, rate_rank=rate_rank, gate_rank=gate_rank)
        self.head_dim, self.num_heads = head_dim, heads_of(hidden_size, head_dim)
        self._init_vectors()
        self.r_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.decay_down = nn.Linear(hidden_size, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, hidden_size, bias=False)
        self.rate_down = nn.Linear(hidden_size, rate_rank, bias=False)
        self.rate_up = nn.Linear(rate_rank, hidden_size, bias=False)
        self.gate_down = nn.Linear(hidden_size, gate_rank, bias=False)
        self.gate_up = nn.Linear(gate_rank, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def _init_vectors(self) -> None:
        """Parameters a channel, with the initial values of the official code's first layer."""
        size = self.num_heads * self.head_dim
        place, ramp = torch.arange(size) / size, torch.linspace(0, 1, size)
        wave = torch.linspace(-1, 1, self.head_dim).repeat(self.num_heads)
        zigzag = wave * wave.abs()
        powers = (0.2, 0.7, 0.7, 0.9, 0.9, 0.2)
        self.shift = nn.Parameter(1 - torch.stack([place**power for power in powers]))
        self.decay_bias = nn.Parameter(-5.5 + 6 * ramp + 2.5 * zigzag)
        self.rate_bias = nn.Parameter(-0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5))
        self.removal_scale = nn.Parameter(0.71 - 0.1 * (ramp - 0.5))
        self.rate_scale = nn.Parameter(torch.full((size,), 1.02))
        self.bonus = nn.Parameter(torch.full((self.num_heads, self.head_dim), -0.04))
        self.norm_weight = nn.Parameter(torch.ones(size))
        self.norm_bias = nn.Parameter(torch.zeros(size))

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        shape = (self.num_heads, self.head_dim, self.head_dim)
        return {
            "last": TensorSpec((self.num_heads * self.head_dim,)),
            "memory": TensorSpec(shape, state_dtype(dtype)),
        }

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        last, memory = (None, None) if state is None else (state["last"], state["memory"])
        inputs, gate = self._project(x, token_shift(x, last))
        out, memory = generalized_delta_rule(*inputs, memory)
        after = None if last is None else State(last=x[:, -1].to(last.dtype), memory=memory)
        return self._output(out, inputs, gate), after

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        inputs, gate = self._project(x, state["last"])
        out = generalized_delta_rule_step(*inputs, state["memory"])
        state["last"].copy_(x)
        return self._output(out, inputs, gate)

    def _project(
        self, x: Float[Tensor, "... C"], previous: Float[Tensor, "... C"]
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
        """r, k, v, -h, a h and log w, by heads; and the gate."""
        x_r, x_k, x_v, x_decay, x_rate, x_gate = (
            torch.lerp(x, previous, share) for share in self.shift.to(x.dtype)
        )
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        decay = self.decay_up(self.decay_down(x_decay).tanh()).to(state_dtype(x.dtype))
        log_decay = -STRONGEST_DECAY * (decay + self.decay_bias.to(decay.dtype)).sigmoid()
        rate = (self.rate_up(self.rate_down(x_rate)) + self.rate_bias.to(k.dtype)).sigmoid()
        removal = k * self.removal_scale.to(k.dtype)
        k = k * (1 + (rate - 1) * self.rate_scale.to(k.dtype))
        r, k, v, removal, rate, log_decay = (
            y.unflatten(-1, (-1, self.head_dim)) for y in (r, k, v, removal, rate, log_decay)
        )
        removal = F.normalize(removal, dim=-1)
        gate = self.gate_up(self.gate_down(x_gate).sigmoid())
        return (r, k, v, -removal, rate * removal, log_decay), gate

    def _output(self, out: Tensor, inputs: tuple[Tensor, ...], gate: Tensor) -> Tensor:
        r, k, v, *_ = inputs
        own = (r * k * self.bonus.to(k.dtype)).sum(-1, keepdim=True) * v
        normed = head_layer_norm(out, self.norm_weight, self.norm_bias)
        return self.out_proj((normed + own.flatten(-2)) * gate)
