"""Full softmax attention with rotary positions: Transformer++'s mixer."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from based.mixers.base import Mixer, TensorSpec, split_heads
from based.mixers.state import State
from based.ops.rotary import frequencies_on, rotate
from based.ops.sliding_window_attention import attention_step
from based.ops.softmax_attention import softmax_attention

# The cache grows by whole pages of this many tokens.
PAGE = 256


class SoftmaxAttention(Mixer):
    """Causal attention over all keys; `rotary_fraction` of each head is rotated.

    The state is the cache of rotated keys and values, in whole pages of 256
    tokens, and the number of tokens seen: it grows with length, unless the state's
    `room` says that it is large enough. `num_kv_heads` heads of keys and values,
    as many as queries if None, are shared by equal groups of query heads.
    """

    fixed_state: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 16,
        rotary_fraction: float = 1.0,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.rotary_fraction = num_heads, rotary_fraction
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = split_heads(hidden_size, num_heads)
        split_heads(num_heads, self.num_kv_heads)
        heads = num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        cache = TensorSpec((-(-length // PAGE) * PAGE, self.num_kv_heads, self.head_dim))
        return {"keys": cache, "values": cache, "length": TensorSpec((), torch.long)}

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        token = torch.arange(x.shape[1], device=x.device)[None]
        if state is None:
            q, k, v = self._project(x, token)
            return self.out_proj(softmax_attention(q, k, v).flatten(-2)), None
        seen = state["length"]
        longest = int(seen.max()) if seen.numel() else 0
        q, k, v = self._project(x, seen[:, None] + token)
        after = self._append(state, k, v, longest)
        if longest == 0:
            out = softmax_attention(q, k, v)
        else:
            end = longest + x.shape[1]
            out = softmax_attention(q, after["keys"][:, :end], after["values"][:, :end], seen)
        return self.out_proj(out.flatten(-2)), after

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        if state.room < 1:
            longest = int(state["length"].max()) if x.shape[0] else 0
            state.update(_grow(state, longest + 1))
            state.room = state["keys"].shape[1] - longest
        state.room -= 1
        frequencies = frequencies_on(x.device, self.head_dim, self.rotary_fraction)
        q, k, v = self._heads(x)
        cache = state["keys"], state["values"], state["length"]
        out = attention_step(q, k, v, *cache, frequencies)
        return self.out_proj(out.flatten(-2))

    def join_states(self, states: Sequence[State]) -> State:
        capacity = max(state["keys"].shape[1] for state in states)
        return State.concatenate([_grow(state, capacity) for state in states])

    def _append(self, state: State, k: Tensor, v: Tensor, longest: int) -> State:
        """A new state with the keys and values behind each row's own."""
        seen, new = state["length"], k.shape[1]
        grown = _grow(state, longest + new)
        slot = (seen[:, None] + torch.arange(new, device=k.device))[..., None, None]
        slot = slot.expand(-1, -1, *k.shape[2:])
        keys = grown["keys"].scatter(1, slot, k.to(grown["keys"].dtype))
        values = grown["values"].scatter(1, slot, v.to(grown["values"].dtype))
        return State(keys=keys, values=values, length=seen + new)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._heads(x)
        frequencies = frequencies_on(x.device, self.head_dim, self.rotary_fraction)
        return rotate(q, position, frequencies), rotate(k, position, frequencies), v

    def _heads(self, x: Float[Tensor, "... C"]) -> tuple[Tensor, ...]:
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        return heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)


def _grow(state: State, tokens: int) -> State:
    """The state with room for `tokens` tokens: whole pages, never fewer than it has."""
    missing = -(-tokens // PAGE) * PAGE - state["keys"].shape[1]
    if missing <= 0:
        return state
    keys, values = (F.pad(state[name], (0, 0, 0, 0, 0, missing)) for name in ("keys", "values"))
    return State(keys=keys, values=values, length=state["length"])
