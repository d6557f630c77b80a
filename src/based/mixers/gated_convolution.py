"""Gated short convolution, BaseConv: exact local shifts (paper section 4.1)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from based.mixers.base import Mixer, TensorSpec, at_least_one
from based.mixers.state import State
from based.ops.few_rows_linear import (
    Projected,
    Residual,
    linear,
    linear_convolution,
    norm_linear_convolution,
)
from based.ops.gated_short_convolution import (
    gated_short_convolution,
    has_kernels,
    last_inputs,
)


class GatedConvolution(Mixer):
    """out_proj(silu(conv(u)) * g), u and g two projections to `expand` times the width.

    The state is the last kernel_size - 1 inputs of the convolution.
    """

    def __init__(self, hidden_size: int, kernel_size: int = 3, expand: int = 2) -> None:
        super().__init__()
        at_least_one(kernel_size=kernel_size, expand=expand)
        self.inner_size = expand * hidden_size
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner_size)
        self.conv_weight = nn.Parameter(torch.empty(self.inner_size, kernel_size))
        self.out_proj = nn.Linear(self.inner_size, hidden_size)
        nn.init.uniform_(self.conv_weight, -(kernel_size**-0.5), kernel_size**-0.5)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {"inputs": TensorSpec((self.conv_weight.shape[1] - 1, self.inner_size))}

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        return self._mix(x, None, state)

    def mix_packed(
        self,
        x: Float[Tensor, "1 T C"],
        cu_seqlens: Int[Tensor, " E"],
        state: State | None = None,
    ) -> tuple[Float[Tensor, "1 T C"], State | None]:
        return self._mix(x, cu_seqlens, state)

    def begin_packed(
        self, x: Float[Tensor, "1 T C"], cu_seqlens: Int[Tensor, " E"]
    ) -> tuple[Float[Tensor, "1 T C"], State]:
        projected = self.in_proj(x)
        weight = self.conv_weight.to(projected.dtype)
        y, _ = gated_short_convolution(projected, weight, cu_seqlens=cu_seqlens)
        inputs = projected[..., : self.inner_size]
        return self.out_proj(y), State(inputs=last_inputs(inputs, cu_seqlens, weight.shape[1] - 1))

    def _mix(
        self, x: Tensor, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, State | None]:
        projected = self.in_proj(x)
        past = None if state is None else state["inputs"]
        weight = self.conv_weight.to(projected.dtype)
        y, past = gated_short_convolution(projected, weight, past, cu_seqlens)
        return self.out_proj(y), None if past is None else State(inputs=past)

    def segment_state(self, x: Float[Tensor, "B T C"], position: int) -> State:
        count = self.conv_weight.shape[1] - 1
        inputs, _ = self.in_proj(x[:, max(x.shape[1] - count, 0) :]).chunk(2, dim=-1)
        return State(inputs=F.pad(inputs, (0, 0, count - inputs.shape[1], 0)))

    def join_segments(self, before: State, after: State, position: int, length: int) -> State:
        count = self.conv_weight.shape[1] - 1
        new = min(length, count)
        inputs = torch.cat([before["inputs"], after["inputs"][:, count - new :]], dim=1)
        return State(inputs=inputs[:, new:])

    @property
    def captures_packed(self) -> bool:
        return has_kernels(self.conv_weight.shape[1], self.conv_weight)

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        convolution = self.conv_weight, state["inputs"]
        return self.out_proj(linear_convolution(x, self.in_proj, *convolution))

    def step_residual(
        self, residual: Residual, state: State
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "*S B C"] | Projected]:
        convolution = self.conv_weight, state["inputs"]
        x, y = norm_linear_convolution(residual, self.in_proj, *convolution)
        return x, linear(y, self.out_proj)
