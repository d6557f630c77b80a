"""Mamba: a selective state space (arXiv 2312.00752)."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from based.mixers.base import Mixer, TensorSpec, at_least_one
from based.mixers.parts import ShortConvolution, time_step_bias
from based.mixers.state import State
from based.ops.kernels import use_kernels
from based.ops.precision import state_dtype
from based.ops.selective_scan import selective_scan, selective_scan_step


class Mamba(Mixer):
    """h_t = exp(d_t A) h_(t-1) + d_t x_t B_t^T, y_t = h_t C_t + D x_t; out_proj(y silu(z)).

    x is projected, convolved and gated by z; the time step d, B and C depend on x.
    The state is h, expand * hidden_size * state_size numbers in float32, and the
    convolution's last inputs.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")
    own_init: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 16,
        conv_size: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
    ) -> None:
        super().__init__()
        inner, rank = expand * hidden_size, -(-hidden_size // 16) if dt_rank is None else dt_rank
        at_least_one(state_size=state_size, expand=expand, dt_rank=rank)
        self.split = (rank, state_size, state_size)
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.conv = ShortConvolution(inner, conv_size, bias=True)
        self.x_proj = nn.Linear(inner, sum(self.split), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.dt_bias = nn.Parameter(time_step_bias(inner))
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {
            "conv": self.conv.state_spec(),
            "h": TensorSpec(tuple(self.A_log.shape), state_dtype(dtype)),
        }

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        before, h = (None, None) if state is None else (state["conv"], state["h"])
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = self.conv(u, before)
        y, h = selective_scan(u, *self._selection(u), h)
        return self._output(y, u, z), None if conv is None else State(conv=conv, h=h)

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv.step(u, state["conv"])
        if use_kernels(u):
            from based.ops.selective_scan.decode import scan_step_kernel

            dt, B, C = self.x_proj(u).split(self.split, dim=-1)
            dt, parameters = F.linear(dt, self.dt_weight), (self.dt_bias, self.A_log)
            y = scan_step_kernel(u, dt, *parameters, B, C, self.D, z, state["h"])
            return self.out_proj(y)
        return self._output(selective_scan_step(u, *self._selection(u), state["h"]), u, z)

    def _selection(self, u: Float[Tensor, "... D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The time step, A, B and C."""
        dt, B, C = self.x_proj(u).split(self.split, dim=-1)
        wide = state_dtype(u.dtype)
        dt = F.softplus(F.linear(dt, self.dt_weight).to(wide) + self.dt_bias.to(wide))
        return dt, -self.A_log.to(wide).exp(), B, C

    def _output(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return self.out_proj((y + self.D.to(u.dtype) * u) * F.silu(z))
