"""The one interface of all sequence mixers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from based.errors import BasedError
from based.mixers import packing
from based.mixers.state import State
from based.ops.few_rows_linear import Projected, Residual, normed


class TensorSpec(NamedTuple):
    """One tensor of a state, without its batch axis; dtype None is the activations' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@runtime_checkable
class Shard(Protocol):
    """What lets a mixer work on one shard of sequences whose other shards are elsewhere."""

    def mix(
        self, mixer: Mixer, x: Float[Tensor, "B T C"], cu_seqlens: Int[Tensor, " E"] | None
    ) -> Float[Tensor, "B T C"]:
        """The mixer's output on this shard, as if it saw the whole sequences."""
        ...


class Mixer(nn.Module, ABC):
    """Maps `[B, T, hidden_size]` to the same shape; output t depends on inputs 0 .. t.

    A mixer defines `state_spec`, `mix` (parallel form) and `step` (recurrent
    form); zeros are the state before the first token. `mix_packed` has a general
    form here, and a mixer overrides it only for speed.
    """

    #: Whether the state keeps its size whatever the length.
    fixed_state: ClassVar[bool] = True
    #: Parameters that weight decay leaves alone, whatever their number of axes.
    undecayed: ClassVar[tuple[str, ...]] = ()
    #: Whether linear weights begin as the mixer made them, rather than as the model's others.
    own_init: ClassVar[bool] = False
    #: Set while sequences are split over ranks (`based.training.context_parallel`).
    shard: Shard | None = None

    @abstractmethod
    def state_spec(self, length: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Tensors that one sequence occupies after `length` tokens of activations `dtype`."""

    @abstractmethod
    def mix(
        self, x: Float[Tensor, "B T C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        """Parallel form from a state (zeros if None); returns the next state if one was given."""

    @abstractmethod
    def step(self, x: Float[Tensor, "B C"], state: State) -> Float[Tensor, "B C"]:
        """Recurrent form: one token for every row; changes the state in place. No gradients."""

    def step_residual(
        self, residual: Residual, state: State
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "*S B C"] | Projected]:
        """The residual's sum, and `step` of its norm, perhaps as parts of a sum, or not projected.

        Overridden where the norm, or the next one, can join the kernels of the step.
        """
        x, y = normed(residual)
        return x, self.step(y, state)

    def mix_packed(
        self,
        x: Float[Tensor, "1 T C"],
        cu_seqlens: Int[Tensor, " E"],
        state: State | None = None,
    ) -> tuple[Float[Tensor, "1 T C"], State | None]:
        """Parallel form over packed sequences; the state has a row for each."""
        return packing.mix_each_sequence(self, x, cu_seqlens, state)

    def begin_packed(
        self, x: Float[Tensor, "1 T C"], cu_seqlens: Int[Tensor, " E"]
    ) -> tuple[Float[Tensor, "1 T C"], State]:
        """`mix_packed` of sequences that begin here, and the state that each one leaves."""
        y, after = self.mix_packed(x, cu_seqlens, self.init_state(len(cu_seqlens) - 1))
        assert after is not None
        return y, after

    @property
    def captures_packed(self) -> bool:
        """Whether `begin_packed` never waits for the GPU that the weights are on.

        Then a CUDA graph can hold it. A CPU has nothing to wait for.
        """
        return False

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        state: State | None = None,
        cu_seqlens: Int[Tensor, " E"] | None = None,
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        """Mixes whole sequences, or continues them from `state`; differentiable.

        With `cu_seqlens` the batch is packed: B = 1, and sequence i is the tokens
        cu_seqlens[i] .. cu_seqlens[i + 1]. The given state is not changed.
        """
        if self.shard is not None and state is None:
            return self.shard.mix(self, x, cu_seqlens), None
        if cu_seqlens is None:
            return self.mix(x, state)
        return self.mix_packed(x, cu_seqlens, state)

    def segment_state(self, x: Float[Tensor, "B T C"], position: int) -> State:
        """The state that these tokens leave by themselves, the first one at `position`."""
        _, after = self.mix(x, self.init_state(x.shape[0]))
        assert after is not None
        return after

    def join_segments(self, before: State, after: State, position: int, length: int) -> State:
        """The state after two adjoining segments, from each one's own.

        `after` is the `segment_state` of `length` tokens, the first at `position`; of
        its tensors only those of floating point are there. Differentiable.
        """
        raise BasedError(
            f"{type(self).__name__} has no rule to join segments, so its sequences cannot be "
            "split over ranks; set context_parallel to 1"
        )

    def mixing_flops(self, length: int) -> int:
        """Floating-point operations a token of mixing alone, projections not counted.

        Forward, the mean over a sequence of `length` tokens.
        """
        return 0

    def join_states(self, states: Sequence[State]) -> State:
        """One state with the rows of all; overridden where rows can differ in size."""
        return State.concatenate(states)

    def decode_spec(self, length: int, dtype: torch.dtype, recent: int) -> dict[str, TensorSpec]:
        """`state_spec`, and what `step` needs to defer updates by up to `recent` tokens.

        Overridden where that makes decoding faster; `defer` then enters that form, and `settle`
        leaves it.
        """
        return self.state_spec(length, dtype)

    def defer(self, state: State) -> State:
        """A canonical state with the tensors of `decode_spec`; those missing begin as zeros."""
        return state

    def settle(self, state: State) -> None:
        """Gives the tensors of `state_spec` their canonical values, in place."""
        return

    def init_state(self, batch_size: int, length: int = 0, recent: int = 0) -> State:
        """The state before the first token, with room for `length` tokens where it grows.

        Its updates may lag by up to `recent` tokens: see `decode_spec`.
        """
        like = next(self.parameters())
        return State(
            {
                name: torch.zeros(
                    (batch_size, *spec.shape), dtype=spec.dtype or like.dtype, device=like.device
                )
                for name, spec in self.decode_spec(length, like.dtype, recent).items()
            }
        )

    def state_bytes(self, length: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that one sequence's state occupies after `length` tokens."""
        specs = self.state_spec(length, dtype).values()
        return sum(prod(spec.shape) * (spec.dtype or dtype).itemsize for spec in specs)


def split_heads(hidden_size: int, num_heads: int) -> int:
    """The head_dim, or one line that says why the heads do not divide the width."""
    if num_heads < 1 or hidden_size % num_heads:
        raise BasedError(
            f"hidden_size {hidden_size} does not divide into {num_heads} heads; "
            "choose num_heads among its divisors"
        )
    return hidden_size // num_heads


def at_least_one(**options: int) -> None:
    """Refuses a dial below 1, by its name."""
    for name, value in options.items():
        if value < 1:
            raise BasedError(f"{name} is {value}; it must be at least 1")


def probability(**options: float) -> None:
    """Refuses a probability outside [0, 1), by its name."""
    for name, value in options.items():
        if not 0 <= value < 1:
            raise BasedError(f"{name} is {value}; it must be at least 0 and below 1")
