"""BaseConv as the paper's recall experiments have it: a data-independent gated convolution."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from based.mixers.base import Mixer, TensorSpec, at_least_one
from based.mixers.state import State
from based.ops.gated_short_convolution import next_past
from based.ops.short_convolution import activated_convolution


class BaseConvolution(Mixer):
    """(conv(u) + c) * (W u + b) + u, without activation (Arora et al. 2023, Zoology).

    The state is the last kernel_size - 1 inputs. `GatedConvolution` is the form of
    Based's language models.
    """

    def __init__(self, hidden_size: int, kernel_size: int = 3) -> None:
        super().__init__()
        at_least_one(kernel_size=kernel_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        bound = kernel_size**-0.5
        self.conv_weight = nn.Parameter(
            torch.empty(hidden_size, kernel_size).uniform_(-bound, bound)
        )
        self.conv_bias = nn.Parameter(torch.empty(hidden_size).uniform_(-bound, bound))

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        channels, kernel_size = self.conv_weight.shape
        return {"inputs": TensorSpec((kernel_size - 1, channels))}

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

    def _mix(
        self, x: Tensor, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, State | None]:
        past = None if state is None else state["inputs"]
        taps = self.conv_weight, self.conv_bias
        y = activated_convolution(x, *taps, self.proj(x), past, cu_seqlens)
        return y, None if past is None else State(inputs=next_past(x, past, cu_seqlens))

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        y, after = self.mix(x[:, None], state)
        assert after is not None
        state["inputs"].copy_(after["inputs"])
        return y[:, 0]
