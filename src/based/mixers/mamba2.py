"""Mamba-2: a state space with one decay a head (arXiv 2405.21060)."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from based.mixers.base import Mixer, TensorSpec, at_least_one
from based.mixers.parts import ShortConvolution, heads_of, time_step_bias
from based.mixers.state import State
from based.ops.decayed_linear_attention import (
    decayed_linear_attention,
    decayed_linear_attention_step,
)
from based.ops.gated_norm import gated_norm
from based.ops.precision import state_dtype


class Mamba2(Mixer):
    """h_t = exp(d_t A) h_(t-1) + d_t B_t x_t^T, y_t = h_t^T C_t + D x_t, a head at a time.

    A and the time step d are one number a head; B and C are shared by all heads.
    out_proj(norm(y silu(z))). The state is h, expand * hidden_size * state_size
    numbers in float32, and the convolution's last inputs (x, B and C).
    """

    undecayed: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")
    own_init: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 128,
        head_dim: int = 64,
        conv_size: int = 4,
        expand: int = 2,
    ) -> None:
        super().__init__()
        at_least_one(state_size=state_size, expand=expand)
        inner = expand * hidden_size
        heads = heads_of(inner, head_dim)
        self.head_dim, self.state_size = head_dim, state_size
        self.conv = ShortConvolution(inner + 2 * state_size, conv_size, bias=True)
        self.split = (inner, inner + 2 * state_size, heads)
        self.in_proj = nn.Linear(hidden_size, sum(self.split), bias=False)
        self.dt_bias = nn.Parameter(time_step_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        shape = (self.A_log.shape[0], self.state_size, self.head_dim)
        return {"conv": self.conv.state_spec(), "h": TensorSpec(shape, state_dtype(dtype))}

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        before, h = (None, None) if state is None else (state["conv"], state["h"])
        z, convolved, dt = self.in_proj(x).split(self.split, dim=-1)
        convolved, conv = self.conv(convolved, before)
        u, inputs = self._inputs(convolved, dt)
        y, h = decayed_linear_attention(*inputs, h)
        return self._output(y, u, z), None if conv is None else State(conv=conv, h=h)

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        z, convolved, dt = self.in_proj(x).split(self.split, dim=-1)
        u, inputs = self._inputs(self.conv.step(convolved, state["conv"]), dt)
        return self._output(decayed_linear_attention_step(*inputs, state["h"]), u, z)

    def _inputs(
        self, convolved: Float[Tensor, "... D"], dt: Float[Tensor, "... H"]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """x by heads; and queries, keys, values and log decays of linear attention."""
        sizes = (self.split[0], self.state_size, self.state_size)
        u, B, C = convolved.split(sizes, dim=-1)
        u = u.unflatten(-1, (-1, self.head_dim))
        wide = state_dtype(u.dtype)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        log_decay = -self.A_log.to(wide).exp() * dt
        # d_t B_t x_t^T: the smaller of the two is scaled.
        keys, values = B[..., None, :], u
        if self.state_size < self.head_dim:
            keys = (dt[..., None] * keys).to(u.dtype)
        else:
            values = (dt[..., None] * u).to(u.dtype)
        return u, (C[..., None, :], keys, values, log_decay[..., None])

    def _output(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(gated_norm(y, u, z, self.D, self.norm_weight))
