"""What a configuration costs: parameters and state, counted without allocating anything."""

from dataclasses import dataclass
from itertools import product

import torch

from based.errors import BasedError
from based.models.decoder import Decoder
from based.models.presets import preset, transformer_of_size
from based.models.skeleton import skeleton

# Settings of the dials that `settings_within` tries.
FEATURE_DIMS = (4, 8, 12, 16, 24, 32)
WINDOWS = (17, 33, 65, 129, 257, 513)


@dataclass(frozen=True)
class LayerCost:
    """The layers that have the same mixer."""

    mixer: str
    layers: tuple[int, ...]
    parameters: int
    """Of one such layer, its MLP and norms included."""
    state_bytes: int
    """Of one such layer and one sequence."""
    fixed_state: bool


def layer_costs(model: Decoder, length: int, dtype: torch.dtype) -> list[LayerCost]:
    """One entry for each kind of mixer, in order of first use; state after `length` tokens."""
    costs = []
    for name in dict.fromkeys(model.config.mixers):
        layers = tuple(i for i, mixer in enumerate(model.config.mixers) if mixer == name)
        block = model.blocks[layers[0]]
        mixer = model.mixers()[layers[0]]
        costs.append(
            LayerCost(
                mixer=name,
                layers=layers,
                parameters=sum(p.numel() for p in block.parameters()),
                state_bytes=mixer.state_bytes(length, dtype),
                fixed_state=mixer.fixed_state,
            )
        )
    return costs


def transformer_cache_bytes(model: Decoder, length: int, dtype: torch.dtype) -> tuple[int, int]:
    """Layers, and bytes of the KV cache of one sequence, of a Transformer++ of this size."""
    config = model.config
    twin = transformer_of_size(model.num_parameters(), config.hidden_size, config.vocab_size)
    layers = len(twin.mixers)
    return layers, 2 * layers * config.hidden_size * length * dtype.itemsize


def training_flops(model: Decoder, length: int) -> int:
    """Operations a token of a training step: three times the forward pass's products.

    Every matrix product (the head included, the embedding's look-up not) and what
    the mixers add to them over a sequence of `length`; nothing computed anew counts.
    """
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    mixing = sum(mixer.mixing_flops(length) for mixer in model.mixers())
    return 3 * (2 * matrices + mixing)


def settings_within(name: str, budget: int, dtype: torch.dtype) -> list[tuple[int, int, int]]:
    """(feature_dim, window, state bytes) of the preset that fit `budget` bytes, largest first."""
    if not name.startswith("based-"):
        raise BasedError(f"{name} has no dials for --budget; the based-* presets have them")
    found = []
    for feature_dim, window in product(FEATURE_DIMS, WINDOWS):
        config = preset(name, feature_dim=feature_dim, window=window)
        size = skeleton(config).state_bytes(0, dtype)
        if size <= budget:
            found.append((feature_dim, window, size))
    return sorted(found, key=lambda row: -row[2])
