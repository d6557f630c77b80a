"""H3: a shift and a diagonal state-space model with multiplications between (Fu et al. 2023)."""

from math import log, pi

import torch
from jaxtyping import Float
from torch import Tensor, nn

from based.errors import BasedError
from based.mixers.base import Mixer, TensorSpec
from based.mixers.state import State
from based.ops.diagonal_state_space import diagonal_state_space, diagonal_state_space_step
from based.ops.gated_short_convolution import next_past
from based.ops.long_convolution import long_convolution
from based.ops.outer_product import outer_product, vector_matrix_product
from based.ops.precision import state_dtype


class H3(Mixer):
    """q * SSM_diagonal(SSM_shift(k) v^T), the outer product within heads of `head_dim` channels.

    The shift model is a convolution over `state_size` tokens; a head's diagonal model
    has state_size / 2 conjugate pairs, S4D-Lin, discretised bilinearly. The state is
    the last state_size - 1 keys, and in float32 `[heads, head_dim, head_dim,
    state_size / 2, 2]`: state_size * head_dim * hidden_size numbers.
    """

    def __init__(self, hidden_size: int, state_size: int = 64, head_dim: int = 2) -> None:
        super().__init__()
        if state_size < 2 or state_size % 2:
            raise BasedError(f"state_size is {state_size}; it must be an even number, at least 2")
        if head_dim < 1 or hidden_size % head_dim:
            raise BasedError(
                f"hidden_size {hidden_size} does not divide into heads of head_dim {head_dim}"
            )
        self.head_dim, self.num_heads = head_dim, hidden_size // head_dim
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        # By lag; the skip connection of the shift model is part of lag 0.
        taps = torch.empty(state_size, hidden_size).uniform_(-(state_size**-0.5), state_size**-0.5)
        taps[0] += torch.randn(hidden_size)
        self.shift_weight = nn.Parameter(taps)
        pairs = (self.num_heads, state_size // 2)
        self.A_log = nn.Parameter(torch.full(pairs, log(0.5)))
        self.A_imag = nn.Parameter(pi * torch.arange(pairs[1]).repeat(pairs[0], 1))
        self.C = nn.Parameter(torch.randn(*pairs, 2) * 2**-0.5)
        self.log_dt = nn.Parameter(torch.empty(self.num_heads).uniform_(log(1e-3), log(1e-1)))
        self.skip = nn.Parameter(torch.randn(self.num_heads))

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        taps, channels = self.shift_weight.shape
        memory = (self.num_heads, self.head_dim, self.head_dim, taps // 2, 2)
        return {
            "keys": TensorSpec((taps - 1, channels)),
            "memory": TensorSpec(memory, state_dtype(dtype)),
        }

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        taps = self.shift_weight.to(state_dtype(x.dtype))
        window, memory = k.to(taps.dtype), None
        if state is not None:
            window = torch.cat([state["keys"].to(taps.dtype), window], dim=1)
            memory = state["memory"].flatten(2, 3)
        shifted = long_convolution(window, taps)[:, window.shape[1] - k.shape[1] :]
        products = outer_product(shifted, v.to(shifted.dtype), self.num_heads).flatten(-2)
        system = self._system(taps.dtype)
        y, memory = diagonal_state_space(products, *system, memory, state is not None)
        out = self._read(q, y)
        if state is None or memory is None:
            return out, None
        memory = memory.unflatten(2, (self.head_dim, self.head_dim))
        return out, State(keys=next_past(k, state["keys"]), memory=memory)

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        taps, memory = self.shift_weight.to(state_dtype(x.dtype)), state["memory"]
        window = torch.cat([state["keys"], k[:, None].to(state["keys"].dtype)], dim=1)
        shifted = (window * taps.flip(0)).sum(1, keepdim=True)
        products = outer_product(shifted, v[:, None].to(shifted.dtype), self.num_heads).flatten(-2)
        y = diagonal_state_space_step(
            products[:, 0],
            *self._system(taps.dtype),
            memory.view(*memory.shape[:2], -1, *memory.shape[4:]),
        )
        state["keys"].copy_(window[:, 1:])
        return self._read(q[:, None], y[:, None])[:, 0]

    def _read(self, q: Float[Tensor, "B T C"], y: Float[Tensor, "B T H E"]) -> Tensor:
        y = y.unflatten(-1, (self.head_dim, self.head_dim))
        return self.out_proj(vector_matrix_product(q.to(y.dtype), y).to(q.dtype))

    def _system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Decay and output weights of every head, complex, the input gain in the latter; skip."""
        A = torch.complex(-self.A_log.to(dtype).exp(), self.A_imag.to(dtype))
        dt = self.log_dt.to(dtype).exp()[:, None]
        implicit = 1 / (1 - dt * A / 2)
        output = torch.view_as_complex(self.C.to(dtype)) * dt * implicit
        return (1 + dt * A / 2) * implicit, output, self.skip.to(dtype)
