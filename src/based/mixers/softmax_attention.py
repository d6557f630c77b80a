"""Full softmax attention with rotary positions: Transformer++'s mixer."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from based.mixers.base import Mixer, TensorSpec, probability, split_heads
from based.mixers.paging import append, grow, paged
from based.mixers.state import State
from based.ops.few_rows_linear import Projected, Residual, linear, norm_linears
from based.ops.rotary import frequencies_on, rotate
from based.ops.sliding_window_attention import attention_step
from based.ops.softmax_attention import softmax_attention

CACHE = ("keys", "values")


class SoftmaxAttention(Mixer):
    """Causal attention over all keys; `rotary_fraction` of each head is rotated.

    The state is the cache of rotated keys and values, in whole pages of 256
    tokens, and the number of tokens seen: it grows with length, unless the state's
    `room` says that it is large enough. `num_kv_heads` heads of keys and values,
    as many as queries if None, are shared by equal groups of query heads.
    `attention_dropout` drops attention weights, in training alone; `bias` is on
    all projections.
    """

    fixed_state: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 16,
        rotary_fraction: float = 1.0,
        attention_dropout: float = 0.0,
        bias: bool = False,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        probability(attention_dropout=attention_dropout)
        self.num_heads, self.rotary_fraction = num_heads, rotary_fraction
        self.attention_dropout = attention_dropout
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = split_heads(hidden_size, num_heads)
        split_heads(num_heads, self.num_kv_heads)
        heads = num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        cache = TensorSpec((paged(length), self.num_kv_heads, self.head_dim))
        return {"keys": cache, "values": cache, "length": TensorSpec((), torch.long)}

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        token = torch.arange(x.shape[1], device=x.device)[None]
        dropout = self.attention_dropout if self.training else 0.0
        if state is None:
            out = softmax_attention(*self._project(x, token), dropout=dropout)
            return self.out_proj(out.flatten(-2)), None
        seen = state["length"]
        longest = int(seen.max()) if seen.numel() else 0
        q, k, v = self._project(x, seen[:, None] + token)
        after = append(state, {"keys": k, "values": v}, longest)
        if longest == 0:
            out = softmax_attention(q, k, v, dropout=dropout)
        else:
            keys, values = (after[name][:, : longest + x.shape[1]] for name in CACHE)
            out = softmax_attention(q, keys, values, seen, dropout)
        return self.out_proj(out.flatten(-2)), after

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        out = self._step(self.qkv_proj(x), state)
        state["length"] += 1
        return self.out_proj(out)

    def step_residual(
        self, residual: Residual, state: State
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "*S B C"] | Projected]:
        x, (qkv,) = norm_linears(residual, [self.qkv_proj])
        out = self._step(qkv, state)
        return x, linear(out, self.out_proj, counter=state["length"])

    def _step(self, qkv: Tensor, state: State) -> Tensor:
        """What the heads give, side by side; `length` is not advanced."""
        if state.room < 1:
            longest = int(state["length"].max()) if qkv.shape[0] else 0
            state.update(grow(state, CACHE, longest + 1))
            state.room = state["keys"].shape[1] - longest
        state.room -= 1
        q, k, v = self._heads(qkv)
        cache = state["keys"], state["values"], state["length"]
        frequencies = frequencies_on(qkv.device, self.head_dim, self.rotary_fraction)
        return attention_step(q, k, v, *cache, frequencies).flatten(-2)

    def join_states(self, states: Sequence[State]) -> State:
        capacity = max(state["keys"].shape[1] for state in states)
        return State.concatenate([grow(state, CACHE, capacity) for state in states])

    def segment_state(self, x: Float[Tensor, "B T C"], position: int) -> State:
        token = torch.arange(position, position + x.shape[1], device=x.device)
        _, k, v = self._project(x, token[None])
        length = torch.full((x.shape[0],), x.shape[1], device=x.device)
        return grow(State(keys=k, values=v, length=length), CACHE, x.shape[1])

    def join_segments(self, before: State, after: State, position: int, length: int) -> State:
        keys, values = (
            torch.cat([before[name][:, :position], after[name][:, :length]], dim=1)
            for name in ("keys", "values")
        )
        joined = State(keys=keys, values=values, length=before["length"] + length)
        return grow(joined, CACHE, position + length)

    def mixing_flops(self, length: int) -> int:
        return 2 * (length + 1) * self.num_heads * self.head_dim

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        turned, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=-2)
        frequencies = frequencies_on(x.device, self.head_dim, self.rotary_fraction)
        # As heads of one tensor, so that angles are worked out once.
        turned = rotate(turned, position, frequencies)
        q, k = turned.split([self.num_heads, self.num_kv_heads], dim=-2)
        return q, k, v

    def _heads(self, qkv: Float[Tensor, "... C"]) -> tuple[Tensor, ...]:
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        return heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)
