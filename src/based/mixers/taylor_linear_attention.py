"""Taylor linear attention: global, fixed-size memory (paper section 4.1)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from based.mixers.base import Mixer, TensorSpec, at_least_one, split_heads
from based.mixers.state import State
from based.ops.few_rows_linear import Projected, Residual, linear, norm_linears
from based.ops.taylor_linear_attention import (
    fold_recent,
    has_kernels,
    join_halves,
    num_features,
    split_halves,
    state_dtype,
    taylor_linear_attention,
    taylor_linear_attention_deferred_step,
    taylor_linear_attention_outputs,
    taylor_linear_attention_step,
)


class TaylorLinearAttention(Mixer):
    """softmax's exp(s) replaced by 1 + s + s^2/2, so that a sum over keys is a state.

    Per head: numerator `[F, head_dim]` and denominator `[F]` in float32, with
    F = 153 packed features at `feature_dim` 16. No bias, rotary or decay.
    """

    def __init__(self, hidden_size: int, num_heads: int = 16, feature_dim: int = 16) -> None:
        super().__init__()
        at_least_one(feature_dim=feature_dim)
        self.num_heads, self.feature_dim = num_heads, feature_dim
        self.head_dim = split_heads(hidden_size, num_heads)
        self.q_proj = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        features = num_features(self.feature_dim)
        return {
            "numerator": TensorSpec((self.num_heads, features, self.head_dim), state_dtype(dtype)),
            "denominator": TensorSpec((self.num_heads, features), state_dtype(dtype)),
        }

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
        out, *after = taylor_linear_attention(*self._project(x), cu_seqlens=cu_seqlens)
        return self.out_proj(out.flatten(-2)), State(numerator=after[0], denominator=after[1])

    def _mix(
        self, x: Tensor, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, State | None]:
        q, k, v = self._project(x)
        if state is None:
            out, after = taylor_linear_attention_outputs(q, k, v, cu_seqlens), None
        else:
            out, numerator, denominator = taylor_linear_attention(
                q, k, v, state["numerator"], state["denominator"], cu_seqlens
            )
            after = State(numerator=numerator, denominator=denominator)
        return self.out_proj(out.flatten(-2)), after

    def decode_spec(self, length: int, dtype: torch.dtype, recent: int) -> dict[str, TensorSpec]:
        spec = self.state_spec(length, dtype)
        if recent and dtype == torch.bfloat16:
            heads, *shape = spec.pop("numerator").shape
            spec["numerator_halves"] = TensorSpec((heads, 2, *shape), torch.int16)
        if recent:
            ring = (recent, self.num_heads)
            spec["recent_keys"] = TensorSpec((*ring, self.feature_dim))
            spec["recent_values"] = TensorSpec((*ring, self.head_dim))
            spec["seen"] = TensorSpec((), torch.long)
        return spec

    def defer(self, state: State) -> State:
        if self.q_proj.weight.dtype != torch.bfloat16:
            return state
        return State(**state, numerator_halves=split_halves(state["numerator"]))

    def settle(self, state: State) -> None:
        if "seen" in state:
            keys, values = state["recent_keys"], state["recent_values"]
            held = state["seen"] % keys.shape[1]
            fold_recent(_numerator(state), state["denominator"], keys, values, held)
            state["seen"].zero_()
        if "numerator_halves" in state:
            state["numerator"] = join_halves(state.pop("numerator_halves"))

    @property
    def captures_packed(self) -> bool:
        return has_kernels(self.feature_dim, self.head_dim, self.q_proj.weight)

    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        out = self._step(self._project(x), state)
        if "seen" in state:
            state["seen"] += 1
        return self.out_proj(out)

    def step_residual(
        self, residual: Residual, state: State
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "*S B C"] | Projected]:
        x, heads = norm_linears(residual, [self.q_proj, self.k_proj, self.v_proj])
        out = self._step(self._split(heads), state)
        return x, linear(out, self.out_proj, counter=state.get("seen"))

    def _step(self, qkv: tuple[Tensor, Tensor, Tensor], state: State) -> Tensor:
        """What the heads give, side by side; `seen` is not advanced."""
        kept = _numerator(state), state["denominator"]
        if "seen" not in state:
            return taylor_linear_attention_step(*qkv, *kept).flatten(-2)
        ring = state["recent_keys"], state["recent_values"], state["seen"]
        return taylor_linear_attention_deferred_step(*qkv, *kept, *ring).flatten(-2)

    def segment_state(self, x: Float[Tensor, "B T C"], position: int) -> State:
        _, k, v = self._project(x)
        _, numerator, denominator = taylor_linear_attention(k, k, v)
        return State(numerator=numerator, denominator=denominator)

    def join_segments(self, before: State, after: State, position: int, length: int) -> State:
        return State({name: tensor + after[name] for name, tensor in before.items()})

    def mixing_flops(self, length: int) -> int:
        # The state is added to and read, a product of F features and head_dim + 1 values each.
        return 4 * self.num_heads * num_features(self.feature_dim) * (self.head_dim + 1)

    def _project(self, x: Float[Tensor, "... C"]) -> tuple[Tensor, Tensor, Tensor]:
        return self._split((self.q_proj(x), self.k_proj(x), self.v_proj(x)))

    def _split(self, qkv: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in qkv)
        return q, k, v


def _numerator(state: State) -> Tensor:
    """As a step stores it."""
    return state["numerator_halves" if "numerator_halves" in state else "numerator"]
