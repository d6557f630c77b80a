"""The lab's models: Zoology's blocks around our mixers, no MLP, no positions, a tied head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from based.mixers import Mixer, build_mixer
from based.mixers.hyena import SineFilter
from based.mixers.rwkv7 import RWKV7
from based.ops.row_norm import layer_norm, rms_norm


class Layer(NamedTuple):
    """A mixer by its registered name, and its options."""

    mixer: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class RecallModelConfig:
    """Shape and initialisation of one model.

    `block` is Zoology's TransformerBlock or its MambaBlock. Linear weights are
    N(0, 0.02) in the former (out_proj divided by sqrt(2 layers) if `small_out`);
    in the latter each mixer's own, out_proj divided by sqrt(layers).
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    block: Literal["transformer", "mamba"] = "transformer"
    embedding_dropout: float = 0.1
    small_out: bool = True


class TransformerBlock(nn.Module):
    """r + mixer(norm1(r)), then r + norm2(r): what is left of the block without its MLP."""

    def __init__(self, size: int, mixer: Mixer) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2 = nn.LayerNorm(size), mixer, nn.LayerNorm(size)

    def mix(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """The part in which tokens meet."""
        normed = layer_norm(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        return x + self.mixer(normed)[0]

    def finish(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """The part a token has to itself."""
        return layer_norm(x, self.norm2.weight, self.norm2.bias, self.norm2.eps, residual=True)


class MambaBlock(nn.Module):
    """r + mixer(rms_norm(r))."""

    def __init__(self, size: int, mixer: Mixer) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(size, eps=1e-5), mixer

    def mix(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """The part in which tokens meet."""
        return x + self.mixer(rms_norm(x, self.norm.weight, 1e-5))[0]

    def finish(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Nothing: the block is its mixer."""
        return x


class Body(nn.Module):
    """All between the embedding and the head: what is the same computation in every lane."""

    def __init__(self, config: RecallModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        block = TransformerBlock if config.block == "transformer" else MambaBlock
        self.blocks = nn.ModuleList(
            block(size, build_mixer(layer.mixer, size, **layer.options)) for layer in config.layers
        )
        self.norm = nn.LayerNorm(size)

    def forward(
        self, x: Float[Tensor, "B T C"], positions: Int[Tensor, "B D"]
    ) -> Float[Tensor, "B D C"]:
        """Final hidden states at `positions` only: only there is anything asked."""
        for number, block in enumerate(self.blocks, 1):
            assert isinstance(block, TransformerBlock | MambaBlock)
            x = block.mix(x)
            if number == len(self.blocks):
                x = x.gather(1, positions.long()[..., None].expand(-1, -1, x.shape[-1]))
            x = block.finish(x)
        return layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)


class RecallModel(nn.Module):
    """Token ids in, hidden states at the queries out; the head is the embedding."""

    def __init__(self, config: RecallModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.body = Body(config)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        depth, plain = len(self.body.blocks), self.config.block == "transformer"
        for name, module in self.body.named_modules():
            _init_like_linear(module)
            if not isinstance(module, nn.Linear):
                continue
            out = name.endswith("out_proj")
            if plain:
                small = out and self.config.small_out
                nn.init.normal_(module.weight, std=0.02 * ((2 * depth) ** -0.5 if small else 1.0))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif out:
                module.weight.mul_(depth**-0.5)

    def forward(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B D"]
    ) -> Float[Tensor, "B D C"]:
        """Final hidden states at `positions`, as in evaluation."""
        return self.body(self.embedding(tokens), positions)

    def logits(self, hidden: Float[Tensor, "... C"]) -> Float[Tensor, "... V"]:
        """Logits of every token of the vocabulary."""
        return F.linear(hidden, self.embedding.weight)

    def mixers(self) -> list[Mixer]:
        """The mixers of all layers, in order."""
        return [module for module in self.body.modules() if isinstance(module, Mixer)]

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that one sequence's state occupies after `length` tokens, all layers."""
        return sum(mixer.state_bytes(length, dtype) for mixer in self.mixers())


def _init_like_linear(module: nn.Module) -> None:
    """Parameters that are not linear layers here and are in Zoology: N(0, 0.02), biases 0.

    So Hyena's filters begin near zero, and RWKV-7's decays and rates all alike.
    """
    if isinstance(module, SineFilter):
        for weight in (*module.weights, module.out_weight):
            nn.init.normal_(weight, std=0.02)
        for bias in module.biases:
            nn.init.zeros_(bias)
    elif isinstance(module, RWKV7):
        nn.init.zeros_(module.decay_bias)
        nn.init.zeros_(module.rate_bias)
