"""Sliding-window attention: exact, local recall (paper section 4.1)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from based.mixers.base import Mixer, TensorSpec, at_least_one, probability, split_heads
from based.mixers.state import State
from based.ops.few_rows_linear import Projected, Residual, linear, norm_linears
from based.ops.packed import longest, positions, sequence_ids
from based.ops.rotary import frequencies_on, rotate
from based.ops.sliding_window_attention import attention_step, sliding_window_attention


class SlidingWindowAttention(Mixer):
    """Rotary softmax attention over the last `window` keys, the query's own included.

    The state is a ring of exactly `window` rotated keys and their values, token t
    in slot t mod window, and the number of tokens seen. `based.ops.
    sliding_window_attention` converts other conventions for `window`. `rotary_fraction`,
    `attention_dropout` and `bias` are those of `SoftmaxAttention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 16,
        window: int = 129,
        rotary_fraction: float = 1.0,
        attention_dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        at_least_one(window=window)
        probability(attention_dropout=attention_dropout)
        self.num_heads, self.window, self.rotary_fraction = num_heads, window, rotary_fraction
        self.attention_dropout = attention_dropout
        self.head_dim = split_heads(hidden_size, num_heads)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        ring = TensorSpec((self.window, self.num_heads, self.head_dim))
        return {"keys": ring, "values": ring, "length": TensorSpec((), torch.long)}

    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        token = torch.arange(x.shape[1], device=x.device)[None]
        if state is None:
            q, k, v = self._project(x, token)
            out = self._attend(q, k, v)
            return self.out_proj(out.flatten(-2)), None
        seen = state["length"]
        new = torch.full_like(seen, x.shape[1])
        out, after = self._continue(*self._project(x, seen[:, None] + token), new, state)
        return self.out_proj(out.flatten(-2)), after

    def mix_packed(
        self,
        x: Float[Tensor, "1 T C"],
        cu_seqlens: Int[Tensor, " E"],
        state: State | None = None,
    ) -> tuple[Float[Tensor, "1 T C"], State | None]:
        place = positions(cu_seqlens, x.shape[1])
        if state is None:
            out = self._attend(*self._project(x, place[None]), cu_seqlens=cu_seqlens)
            return self.out_proj(out.flatten(-2)), None
        # Only attention takes sequences side by side, padded at their ends.
        row, new = sequence_ids(cu_seqlens, x.shape[1]), cu_seqlens.diff()
        padded = len(new), longest(cu_seqlens)
        qkv = self._project(x, (state["length"][row] + place)[None])
        q, k, v = (y.new_zeros(*padded, *y.shape[2:]).index_put((row, place), y[0]) for y in qkv)
        out, after = self._continue(q, k, v, new, state)
        return self.out_proj(out[row, place].flatten(-2))[None], after

    def begin_packed(
        self, x: Float[Tensor, "1 T C"], cu_seqlens: Int[Tensor, " E"]
    ) -> tuple[Float[Tensor, "1 T C"], State]:
        q, k, v = self._project(x, positions(cu_seqlens, x.shape[1])[None])
        out = self._attend(q, k, v, cu_seqlens=cu_seqlens)
        length = cu_seqlens.diff()
        token = self._held(length)
        index, there = (cu_seqlens[:-1, None] + token).clamp(min=0), (token >= 0)[..., None, None]
        keys, values = (torch.where(there, y[0, index], 0) for y in (k, v))
        return self.out_proj(out.flatten(-2)), State(keys=keys, values=values, length=length)

    @property
    def captures_packed(self) -> bool:
        return True

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
        q, k, v = self._heads(qkv)
        cache = state["keys"], state["values"], state["length"]
        frequencies = frequencies_on(qkv.device, self.head_dim, self.rotary_fraction)
        return attention_step(q, k, v, *cache, frequencies).flatten(-2)

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, new: Int[Tensor, " B"], state: State
    ) -> tuple[Tensor, State]:
        """What the heads give after the state's tokens, and the next state; `new` of k are real."""
        seen = state["length"]
        # The window before a query holds window - 1 past keys: all slots but the oldest.
        recent = (seen[:, None] - self.window + 1 + self._slots(q)[:-1]) % self.window
        k = torch.cat([_take(state["keys"], recent).to(k.dtype), k], dim=1)
        v = torch.cat([_take(state["values"], recent).to(v.dtype), v], dim=1)
        return self._attend(q, k, v, past=seen), self._remember(k, v, seen, new, state)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        return sliding_window_attention(q, k, v, self.window, past, cu_seqlens, dropout)

    def segment_state(self, x: Float[Tensor, "B T C"], position: int) -> State:
        first = max(x.shape[1] - self.window, 0)
        token = torch.arange(position + first, position + x.shape[1], device=x.device)
        _, k, v = self._project(x[:, first:], token[None])
        ring = k.new_zeros(x.shape[0], self.window, *k.shape[2:])
        slot = token % self.window
        return State(keys=ring.index_copy(1, slot, k), values=ring.index_copy(1, slot, v))

    def join_segments(self, before: State, after: State, position: int, length: int) -> State:
        end = position + length
        slots = self._slots(after["keys"])
        newest = end - 1 - (end - 1 - slots) % self.window
        new = (newest >= position)[:, None, None]
        keys, values = (torch.where(new, after[x], before[x]) for x in ("keys", "values"))
        return State(keys=keys, values=values, length=before["length"] + length)

    def mixing_flops(self, length: int) -> int:
        # The first queries of a sequence see fewer keys than the window.
        window = min(self.window, length)
        keys = window - window * (window - 1) / (2 * length)
        return round(4 * keys * self.num_heads * self.head_dim)

    def _heads(self, qkv: Float[Tensor, "... C"]) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        frequencies = frequencies_on(x.device, self.head_dim, self.rotary_fraction)
        # As heads of one tensor, so that angles are worked out once.
        turned = rotate(heads[..., :2, :, :].flatten(-3, -2), position, frequencies)
        q, k = turned.chunk(2, dim=-2)
        return q, k, heads[..., 2, :, :]

    def _slots(self, x: Tensor) -> Int[Tensor, " W"]:
        return torch.arange(self.window, device=x.device)

    def _held(self, length: Int[Tensor, " B"]) -> Int[Tensor, "B W"]:
        """Which token each slot holds after so many: the newest whose number modulo window it is.

        Below 0 where there is none.
        """
        last = length[:, None] - 1
        return last - (last - self._slots(length)) % self.window

    def _remember(self, k: Tensor, v: Tensor, seen: Tensor, new: Tensor, state: State) -> State:
        """The ring after `new` tokens; k and v begin with window - 1 past tokens and then those."""
        length = seen + new
        # Of the ring's window tokens one may be older than k's first: that slot keeps what it has.
        index = self._held(length) - seen[:, None] + self.window - 1
        keep = (index < 0)[..., None, None]
        keys = torch.where(keep, state["keys"], _take(k, index.clamp(min=0)))
        values = torch.where(keep, state["values"], _take(v, index.clamp(min=0)))
        return State(keys=keys, values=values, length=length)


def _take(x: Float[Tensor, "B S H D"], index: Int[Tensor, "B W"]) -> Float[Tensor, "B W H D"]:
    return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))
