"""The decoder: pre-norm blocks of a mixer and a SwiGLU, float32 residual, tied embeddings.

One class is every model here. Which mixers it has, and where, is in the config;
what it remembers between calls is a `DecoderState`, one mixer state a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from based.mixers import Mixer, State, build_mixer
from based.mixers.packing import Packing
from based.models.config import DecoderConfig
from based.ops.elementwise import add_rms_norm, swiglu
from based.ops.few_rows_linear import (
    Branch,
    Projected,
    Residual,
    embedded,
    linear,
    norm_linear_swiglu,
    norm_logits,
    normed,
)
from based.ops.kernels import one_step, use_kernels
from based.ops.lanes import in_lanes
from based.ops.linear_cross_entropy import linear_cross_entropy
from based.ops.rotary import frequencies_on


class DecoderState(list[State]):
    """What a model remembers of its sequences: each layer's state, in order."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, all layers and rows."""
        return sum(state.nbytes for state in self)

    def select(self, rows: Int[Tensor, " R"]) -> DecoderState:
        """A copy of the given rows, in that order (repeats allowed)."""
        return DecoderState(state.select(rows) for state in self)

    def narrow(self, first: int, count: int) -> DecoderState:
        """A view of `count` rows from `first` on."""
        return DecoderState(state.narrow(first, count) for state in self)

    def clone(self) -> DecoderState:
        """A copy that shares no memory."""
        return DecoderState(state.clone() for state in self)


def _fuses(x: Tensor) -> bool:
    """Whether kernels without gradients compute what stands between the products."""
    seen = torch.is_grad_enabled() or torch.compiler.is_compiling() or in_lanes()
    return not seen and use_kernels(x)


def _rows(x: Float[Tensor, "... C"]) -> Float[Tensor, "N C"]:
    """As those kernels take it."""
    return x.flatten(0, -2).contiguous()


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 and returned in the weight's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Normalises the last axis."""
        if _fuses(x):
            return add_rms_norm(_rows(x), None, self.weight, self.eps)[1].view(x.shape)
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps).to(self.weight.dtype)

    def added(
        self, x: Float[Tensor, "... C"], branch: Float[Tensor, "... C"]
    ) -> tuple[Float[Tensor, "... C"], Float[Tensor, "... C"]]:
        """x + branch, and that normalised."""
        if _fuses(x):
            total, normed = add_rms_norm(_rows(x), _rows(branch), self.weight, self.eps)
            return total.view(x.shape), normed.view(x.shape)
        x = x + branch
        return x, self(x)

    def of(self, x: Float[Tensor, "B C"], branch: Branch) -> Residual:
        """This norm of x + branch, to be computed by the kernel that needs it."""
        return Residual(x, branch, self.weight, self.eps)


class SwiGLU(nn.Module):
    """fc2(value * silu(gate)), value the first half of fc1's output and gate the second."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Acts on each token alone."""
        projected = self.fc1(x)
        if _fuses(projected):
            y = swiglu(_rows(projected))
            return self.fc2(y.unflatten(0, projected.shape[:-1]))
        value, gate = projected.chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))

    def step(
        self, residual: Residual
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "*S B C"] | Projected]:
        """One token a row: the residual's sum, and this of its norm. No gradients."""
        x, hidden = norm_linear_swiglu(residual, self.fc1)
        return x, linear(hidden, self.fc2)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), on a float32 residual stream.

    Without an MLP (intermediate_size 0) a block is its first half.
    """

    def __init__(self, config: DecoderConfig, mixer: str) -> None:
        super().__init__()
        size = config.hidden_size
        self.mixer_norm = RMSNorm(size, config.norm_eps)
        self.mixer: Mixer = build_mixer(mixer, size, **config.mixer_options.get(mixer, {}))
        self.has_mlp = config.intermediate_size > 0
        if self.has_mlp:
            self.mlp_norm = RMSNorm(size, config.norm_eps)
            self.mlp = SwiGLU(size, config.intermediate_size)

    def forward(
        self, x: Float[Tensor, "B T C"], state: State | None, cu_seqlens: Int[Tensor, " E"] | None
    ) -> tuple[Float[Tensor, "B T C"], State | None]:
        """Parallel form; see `Mixer.forward`."""
        mixed, state = self.mixer(self.mixer_norm(x), state, cu_seqlens)
        return self._finish(x, mixed), state

    def begin_packed(
        self, x: Float[Tensor, "1 T C"], cu_seqlens: Int[Tensor, " E"]
    ) -> tuple[Float[Tensor, "1 T C"], State]:
        """Parallel form of sequences that begin here; see `Mixer.begin_packed`."""
        mixed, state = self.mixer.begin_packed(self.mixer_norm(x), cu_seqlens)
        return self._finish(x, mixed), state

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        if not self.has_mlp:
            return x + mixed
        x, normed = self.mlp_norm.added(x, mixed)
        return x + self.mlp(normed)

    def step(
        self,
        x: Float[Tensor, "B C"],
        branch: Branch,
        state: State,
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "*S B C"] | Projected]:
        """One token for every row; changes the state in place.

        The residual stream comes and goes as a sum, x + branch, that the next norm adds up;
        the branch may itself be parts of a sum, or before its projection (`Residual`).
        """
        x, mixed = self.mixer.step_residual(self.mixer_norm.of(x, branch), state)
        return self.mlp.step(self.mlp_norm.of(x, mixed)) if self.has_mlp else (x, mixed)


class Decoder(nn.Module):
    """Token ids in, next-token logits out; parallel over a sequence or token by token."""

    #: Whether training computes each block's activations anew instead of keeping them.
    recompute: bool = False

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in config.mixers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self._step_block: Callable[..., tuple[Tensor, Tensor | Projected]] = Block.step
        self._compiled_above = 0
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws linear and embedding weights anew; others stay as their modules made them.

        Linear and embedding: N(0, initializer_range), biases 0. The projections
        back to the residual stream (out_proj, fc2): divided by sqrt(2 * layers).
        A mixer with an initialisation of its own (`Mixer.own_init`) keeps it, but for
        that division, by the square root of the model's residual additions.
        """
        std = self.config.initializer_range
        additions = len(self.blocks) * (2 if self.config.intermediate_size else 1)
        made = {m for mixer in self.mixers() if mixer.own_init for m in mixer.modules()}
        for name, module in self.named_modules():
            to_residual = name.endswith(("out_proj", "fc2"))
            if module in made:
                if to_residual and isinstance(module, nn.Linear):
                    module.weight.mul_(additions**-0.5)
                continue
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = (2 * len(self.blocks)) ** -0.5 if to_residual else 1.0
                nn.init.normal_(module.weight, std=std * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def compile_blocks(self) -> None:
        """From now on blocks run compiled (torch.compile), in the parallel form alone.

        Blocks of one kind share what is compiled, once for each shape of input: for
        training, and for prompts that come in few shapes.
        """
        torch.compiler.assume_constant_result(frequencies_on)
        self._allow_recompiling()
        for block in self.blocks:
            block.compile(dynamic=False)

    def compile_steps(self, above: int = 0) -> None:
        """From now on a block's `step` of more rows than that runs compiled: once for each kind.

        For weights that must be unpacked inside of the kernels of their products; others
        have kernels of their own, which this would take apart.
        """
        self._allow_recompiling()
        self._step_block, self._compiled_above = torch.compile(Block.step, dynamic=True), above

    def _allow_recompiling(self) -> None:
        import torch._dynamo.config  # takes seconds

        limit, kinds = torch._dynamo.config.recompile_limit, len(set(self.config.mixers))
        torch._dynamo.config.recompile_limit = max(limit, 16 * kinds)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, which activations have too."""
        return self.embedding.weight.dtype

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: DecoderState | None = None,
        *,
        cu_seqlens: Int[Tensor, " E"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T V"], DecoderState | None]:
        """Logits of every position, and the next state if one was given.

        `mask` is true on real tokens; padding may stand anywhere in a row and
        leaves no trace in the state. `cu_seqlens` marks a packed batch (B = 1).
        """
        x, state = self.hidden(tokens, state, cu_seqlens=cu_seqlens, mask=mask)
        return self.logits(x), state

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        state: DecoderState | None = None,
        *,
        cu_seqlens: Int[Tensor, " E"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T C"], DecoderState | None]:
        """Final hidden states, normalised, ready for `logits`; see `forward`."""
        packing = None
        if mask is not None and not bool(mask.all()):
            packing = Packing.of(mask)
            tokens, cu_seqlens = packing.pack(tokens), packing.cu_seqlens
        x = self._embed(tokens)
        after = []
        for layer, block in enumerate(self.blocks):
            arguments = (x, None if state is None else state[layer], cu_seqlens)
            if self.recompute:
                x, layer_state = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, layer_state = block(*arguments)
            after.append(layer_state)
        x = self.norm(x)
        x = x if packing is None else packing.unpack(x)
        return x, None if state is None else DecoderState(after)

    def begin_packed(
        self, tokens: Int[Tensor, "1 T"], cu_seqlens: Int[Tensor, " E"]
    ) -> tuple[Float[Tensor, "1 T C"], DecoderState]:
        """As `hidden`, of packed sequences that begin here; and the state that each one leaves."""
        x, after = self._embed(tokens), DecoderState()
        for block in self.blocks:
            assert isinstance(block, Block)
            x, state = block.begin_packed(x, cu_seqlens)
            after.append(state)
        return self.norm(x), after

    def logits(self, hidden: Float[Tensor, "... C"]) -> Float[Tensor, "... V"]:
        """Next-token logits from final hidden states; the head is the embedding."""
        return F.linear(hidden, self.embedding.weight)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        state: DecoderState | None = None,
        *,
        cu_seqlens: Int[Tensor, " E"] | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B T"], DecoderState | None]:
        """Sum of the targets' losses (nats), each one's (without gradient), and the next state.

        The logits of all positions are never in memory together.
        """
        x, state = self.hidden(tokens, state, cu_seqlens=cu_seqlens)
        weight = self.embedding.weight
        total, losses = linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())
        return total, losses.view(targets.shape), state

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " B"], state: DecoderState) -> Float[Tensor, "B V"]:
        """Feeds one token to every row, changes the state in place, returns the next logits."""
        return self.step_with_peaks(tokens, state)[0]

    @torch.no_grad()
    def step_with_peaks(
        self, tokens: Int[Tensor, " B"], state: DecoderState
    ) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B P 4"] | None]:
        """As `step`, and what sampling looks for first, where the head's kernel finds it.

        See `token_sampling.sample_tokens`.
        """
        return norm_logits(self._step_blocks(tokens, state), self.embedding.weight)

    @torch.no_grad()
    def step_hidden(self, tokens: Int[Tensor, " B"], state: DecoderState) -> Float[Tensor, "B C"]:
        """As `step`, but returns the final hidden states, ready for `logits`."""
        return normed(self._step_blocks(tokens, state))[1]

    def _step_blocks(self, tokens: Tensor, state: DecoderState) -> Residual:
        first = self.blocks[0]
        assert isinstance(first, Block)
        norm = first.mixer_norm
        x, branch = embedded(tokens, self.embedding.weight, norm.weight, norm.eps)
        step = self._step_block if len(tokens) > self._compiled_above else Block.step
        # The embedding is an ordinary launch. A compiled step has launches of its own.
        with nullcontext() if torch.compiler.is_compiling() else one_step():
            for block, layer_state in zip(self.blocks, state, strict=True):
                assert isinstance(block, Block)
                x, branch = step(block, x, branch, layer_state)
        return self.norm.of(x, branch)

    def init_state(self, batch_size: int, length: int = 0, recent: int = 0) -> DecoderState:
        """The state before the first token; see `Mixer.init_state`."""
        return DecoderState(mixer.init_state(batch_size, length, recent) for mixer in self.mixers())

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Bytes that one sequence's state occupies after `length` tokens."""
        return sum(mixer.state_bytes(length, dtype or self.dtype) for mixer in self.mixers())

    def mixers(self) -> list[Mixer]:
        """The mixers of all layers, in order."""
        return [block.mixer for block in self.blocks if isinstance(block, Block)]

    def num_parameters(self) -> int:
        """Parameters, the tied embedding once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings as the residual stream: float32, or float64 in a float64 model."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.embedding(tokens).to(wide)
