"""Hyena: gates around a convolution whose filter is a small network (Poli et al. 2023)."""

from collections.abc import Sequence
from itertools import pairwise
from math import log, pi
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from based.errors import BasedError
from based.mixers.base import Mixer, TensorSpec, at_least_one
from based.mixers.paging import append, grow, paged
from based.mixers.state import State
from based.ops.gated_short_convolution import next_past
from based.ops.long_convolution import long_convolution
from based.ops.outer_product import outer_product, vector_matrix_product
from based.ops.precision import state_dtype, without_autocast
from based.ops.short_convolution import activated_convolution

# Decay rates reach 1% after this fraction of max_length, from the slowest channel to the fastest.
SLOWEST, FASTEST = 1.5, 0.3


class Hyena(Mixer):
    """out_proj(x2 * (h conv p + D p)), p = x1 * v, of order 2; x1, x2, v short convolutions.

    The filter h is defined for `max_length` tokens and no more. A convolution that
    long has no fixed state: the state is every product p so far, in whole pages of
    256 tokens, the number of tokens, and the short convolution's last two inputs.
    """

    fixed_state: ClassVar[bool] = False
    undecayed: ClassVar[tuple[str, ...]] = ("positions",)

    def __init__(
        self,
        hidden_size: int,
        max_length: int = 2048,
        filter_size: int = 64,
        num_bands: int = 1,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        at_least_one(kernel_size=kernel_size)
        self.hidden_size, self.max_length = hidden_size, max_length
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.conv_weight = _uniform(3 * hidden_size, kernel_size)
        self.conv_bias = _uniform(3 * hidden_size, fan_in=kernel_size)
        self.positions = nn.Parameter(position_features(max_length, num_bands))
        self.filter = SineFilter(hidden_size, self.positions.shape[1], filter_size)
        self.skip = nn.Parameter(torch.randn(hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {
            "products": TensorSpec((paged(length), self.hidden_size)),
            "inputs": TensorSpec((self.conv_weight.shape[1] - 1, 3 * self.hidden_size)),
            "length": TensorSpec((), torch.long),
        }

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        inputs, T = self.in_proj(x), x.shape[1]
        if state is None:
            products, gate = self._gates(inputs, None)
            y = long_convolution(products, self._taps(T))
            return self._out(y, gate), None
        products, gate = self._gates(inputs, state["inputs"])
        seen = state["length"]
        longest = int(seen.max()) if seen.numel() else 0
        after = append(state, {"products": products}, longest)
        after["inputs"] = next_past(inputs, state["inputs"])
        history = after["products"][:, : longest + T]
        y = long_convolution(history.to(products.dtype), self._taps(longest + T))
        # Rows of different lengths stand at different tokens.
        token = seen[:, None] + torch.arange(T, device=x.device)
        y = y.gather(1, token[..., None].expand_as(products))
        return self._out(y, gate), after

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        inputs, seen = self.in_proj(x)[:, None], state["length"]
        products, gate = self._gates(inputs, state["inputs"])
        end = int(seen.max()) + 1
        taps = self._taps(end)
        if end > state["products"].shape[1]:
            state.update(grow(state, ["products"], end))
        state["inputs"].copy_(next_past(inputs, state["inputs"]))
        state["products"][torch.arange(x.shape[0], device=x.device), seen] = products[:, 0]
        lag = seen[:, None] - torch.arange(end, device=x.device)
        weighted = taps[lag.clamp(min=0)] * state["products"][:, :end]
        y = weighted.masked_fill(lag[..., None] < 0, 0).sum(1)
        seen += 1
        return self._out(y.to(products.dtype)[:, None], gate)[:, 0]

    def join_states(self, states: Sequence[State]) -> State:
        capacity = max(state["products"].shape[1] for state in states)
        return State.concatenate([grow(state, ["products"], capacity) for state in states])

    def _gates(self, inputs: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """The products that the long convolution reads, and the gate behind it."""
        taps = self.conv_weight, self.conv_bias
        convolved = activated_convolution(inputs, *taps, past=past, silu=False)
        before, behind, value = convolved.chunk(3, dim=-1)
        # A product channel by channel, in the layout of what multiplies a channel's tokens.
        return outer_product(value, before, self.hidden_size).flatten(-3), behind

    def _out(self, y: Float[Tensor, "B T C"], gate: Float[Tensor, "B T C"]) -> Tensor:
        return self.out_proj(vector_matrix_product(gate, y[..., None, None]))

    def _taps(self, length: int) -> Float[Tensor, "T C"]:
        """The filter, the skip connection part of lag 0."""
        if length > self.max_length:
            raise BasedError(
                f"a sequence of {length} tokens is longer than hyena's max_length "
                f"{self.max_length}; raise max_length"
            )
        taps = self.filter(self.positions[:length], self.max_length)
        return torch.cat([taps[:1] + self.skip.to(taps.dtype), taps[1:]])


class SineFilter(nn.Module):
    """h_t = W sin(f sin(f sin(f z_t))) * exp(-rate t), affine maps before each sine.

    z_t are a token's features, from which the frequencies f, one a unit, are learned too.
    """

    def __init__(self, channels: int, num_features: int, width: int) -> None:
        super().__init__()
        at_least_one(filter_size=width)
        sizes = list(pairwise([num_features, width, width, width]))
        self.weights = nn.ParameterList(_uniform(after, before) for before, after in sizes)
        self.biases = nn.ParameterList(_uniform(after, fan_in=before) for before, after in sizes)
        self.frequency = nn.Parameter(torch.ones(width))
        self.out_weight = _uniform(channels, width)

    @without_autocast
    def forward(self, features: Float[Tensor, "T F"], max_length: int) -> Float[Tensor, "T C"]:
        """The first T taps, in float32 (float64 with float64 weights)."""
        wide = state_dtype(self.out_weight.dtype)
        z = features.to(wide)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            z = (self.frequency.to(wide) * (z @ weight.to(wide).T + bias.to(wide))).sin()
        like = {"device": z.device, "dtype": wide}
        time = torch.arange(len(z), **like)[:, None] / max(max_length - 1, 1)
        channels = self.out_weight.shape[0]
        rate = torch.linspace(log(100) / SLOWEST, log(100) / FASTEST, channels, **like)
        return z @ self.out_weight.to(wide).T * (-time * rate).exp()


def position_features(max_length: int, num_bands: int) -> Float[Tensor, "T F"]:
    """Where learned features of positions begin: time in [0, 1] and complex exponentials."""
    at_least_one(max_length=max_length, num_bands=num_bands)
    token = torch.arange(max_length)[:, None]
    bands = torch.linspace(1e-4, num_bands - 1, num_bands)
    angle = 2 * pi / max_length * token * bands
    return torch.cat([token / max(max_length - 1, 1), angle.cos(), -angle.sin()], dim=-1)


def _uniform(*shape: int, fan_in: int | None = None) -> nn.Parameter:
    """torch's default initialisation of linear and convolution weights."""
    bound = (fan_in or shape[-1]) ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
