"""Linear attention with the feature maps that the paper compares with Taylor's (Figure 3)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from based.errors import BasedError
from based.mixers.base import Mixer, TensorSpec, at_least_one, split_heads
from based.mixers.feature_maps import build_feature_map
from based.mixers.state import State
from based.ops.linear_attention import (
    linear_attention,
    linear_attention_outputs,
    linear_attention_step,
)
from based.ops.packed import positions, sequence_ids
from based.ops.precision import state_dtype


class LinearAttention(Mixer):
    """o_t = sum_i (phi(q_t).phi(k_i)) v_i / sum_i phi(q_t).phi(k_i), phi a named feature map.

    Per head: numerator `[F, head_dim]` and denominator `[F]` in float32; for CosFormer
    also the number of tokens seen. F is feature_dim, 2 feature_dim for CosFormer, and
    `num_features` for Performer. No bias, rotary or decay.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 16,
        feature_dim: int = 16,
        feature_map: str = "pos_elu",
        **map_options: int,
    ) -> None:
        super().__init__()
        at_least_one(feature_dim=feature_dim)
        self.num_heads = num_heads
        self.head_dim = split_heads(hidden_size, num_heads)
        self.q_proj = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.feature_map = build_feature_map(feature_map, feature_dim, **map_options)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        features, wide = self.feature_map.num_features, state_dtype(dtype)
        spec = {
            "numerator": TensorSpec((self.num_heads, features, self.head_dim), wide),
            "denominator": TensorSpec((self.num_heads, features), wide),
        }
        if self.feature_map.max_length is not None:
            spec["length"] = TensorSpec((), torch.long)
        return spec

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
        seen = None if state is None else state.get("length")
        q, k, v = self._project(x, self._positions(x, cu_seqlens, seen))
        if state is None:
            out = linear_attention_outputs(q, k, v, cu_seqlens)
            return self.out_proj(out.flatten(-2)), None
        before = (state["numerator"], state["denominator"])
        out, numerator, denominator = linear_attention(q, k, v, *before, cu_seqlens)
        after = State(numerator=numerator, denominator=denominator)
        if seen is not None:
            after["length"] = seen + (x.shape[1] if cu_seqlens is None else cu_seqlens.diff())
        return self.out_proj(out.flatten(-2)), after

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        x, seen = x[:, None], state.get("length")
        q, k, v = (y[:, 0] for y in self._project(x, self._positions(x, None, seen)))
        out = linear_attention_step(q, k, v, state["numerator"], state["denominator"])
        if seen is not None:
            seen += 1
        return self.out_proj(out.flatten(-2))

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys in the state's dtype, and values."""
        heads, wide = (self.num_heads, -1), state_dtype(x.dtype)
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.unflatten(-1, heads) for y in projections)
        return self.feature_map(q.to(wide), position), self.feature_map(k.to(wide), position), v

    def _positions(
        self, x: Tensor, cu_seqlens: Tensor | None, seen: Tensor | None
    ) -> Int[Tensor, "#B T"]:
        """Each token's position in its sequence; refuses one that the feature map has not."""
        T, limit = x.shape[1], self.feature_map.max_length
        if cu_seqlens is None:
            position = torch.arange(T, device=x.device)[None]
            position = position if seen is None else position + seen[:, None]
        else:
            position = positions(cu_seqlens, T)[None]
            if seen is not None:
                position = position + seen[sequence_ids(cu_seqlens, T)]
        if limit is not None and T:
            # The sizes alone decide in training, where reading a tensor would stall a GPU.
            known = seen is None and cu_seqlens is None
            longest = T if known else int(position.max()) + 1
            if longest > limit:
                raise BasedError(
                    f"a sequence of {longest} tokens is longer than the feature map's "
                    f"max_length {limit}; raise max_length"
                )
        return position
