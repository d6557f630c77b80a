"""The architectures of the lab: how each builds its layers, and what the paper counts as state.

All have two layers unless said otherwise. A dial that a point does not give has
its default here. Published options follow Zoology's experiment configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from based.errors import BasedError
from based.recall.config import Point, Products, Recipe
from based.recall.model import Layer, RecallModel, RecallModelConfig

Dials = Mapping[str, int]
FEATURE_MAPS = ("identity", "relu", "pos_elu", "square", "cosformer", "performer", "all_poly")
CONVOLUTION = Layer("base_convolution", {"kernel_size": 3})


@dataclass(frozen=True)
class Architecture:
    """`layers(d, dials, recipe)`, and `elements(d, dials, length)` of state as the paper counts."""

    name: str
    layers: Callable[[int, Dials, Recipe], tuple[Layer, ...]]
    elements: Callable[[int, Dials, int], int] | None = None
    dials: Dials = field(default_factory=dict)
    block: Literal["transformer", "mamba"] = "transformer"
    small_out: bool = False
    tf32: bool = True
    """Whether products in TF32 leave its accuracy as it is (docs/recall.md, "Arithmetic")."""


def arithmetic_of(point: Point, recipe: Recipe) -> Products:
    """The arithmetic in which a point is trained: TF32 only where that changes nothing."""
    kind = ARCHITECTURES.get(point.architecture)
    exact = kind is not None and not kind.tf32
    return "float32" if exact and recipe.products == "tf32" else recipe.products


def build_model(point: Point, recipe: Recipe) -> RecallModel:
    """The point's model with the weights of its seed; a point that cannot be is a `BasedError`."""
    if point.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BasedError(f"no architecture is named {point.architecture!r}; there are {known}")
    kind = ARCHITECTURES[point.architecture]
    config = RecallModelConfig(
        recipe.vocab_size,
        point.hidden_size,
        kind.layers(point.hidden_size, all_dials(point), recipe),
        kind.block,
        # Zoology's MambaBlock has none.
        recipe.embedding_dropout if kind.block == "transformer" else 0.0,
        kind.small_out,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(point.seed)
        return RecallModel(config)


def all_dials(point: Point) -> dict[str, int]:
    """The point's dials and the defaults of the others; refuses an unknown one."""
    known = ARCHITECTURES[point.architecture].dials
    unknown = ", ".join(sorted(set(point.dials) - set(known)))
    if unknown:
        have = ", ".join(known) or "none"
        raise BasedError(f"{point.architecture} has no dial {unknown}; its dials: {have}")
    return {**known, **point.dials}


def paper_bytes(point: Point, length: int) -> int | None:
    """State bytes by the paper's accounting (float32, its formulas); None where it has none.

    Only for placing a point beside the published ones: `RecallModel.state_bytes`
    is what a state really occupies.
    """
    elements = ARCHITECTURES[point.architecture].elements
    return None if elements is None else 4 * elements(point.hidden_size, all_dials(point), length)


def _behind_convolution(
    mixer: str, options: Callable[[int, Dials, Recipe], dict[str, Any]]
) -> Callable[[int, Dials, Recipe], tuple[Layer, ...]]:
    return lambda d, dials, recipe: (CONVOLUTION, Layer(mixer, options(d, dials, recipe)))


def _twice(
    mixer: str, options: Callable[[int, Dials, Recipe], dict[str, Any]]
) -> Callable[[int, Dials, Recipe], tuple[Layer, ...]]:
    return lambda d, dials, recipe: (Layer(mixer, options(d, dials, recipe)),) * 2


def _features(feature_dim: int) -> int:
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def _feature_map(name: str) -> Architecture:
    """Linear attention with one of the feature maps of Figure 3, as wide as the model."""

    def options(d: int, dials: Dials, recipe: Recipe) -> dict[str, Any]:
        length = {"max_length": recipe.length} if name == "cosformer" else {}
        return {"num_heads": 1, "feature_dim": d, "feature_map": name, **length}

    def elements(d: int, dials: Dials, length: int) -> int:
        features = 2 * d if name == "cosformer" else d
        return (d + 1) * features + 3 * d

    return Architecture(name, _behind_convolution("linear_attention", options), elements)


def _as_shipped(*mixers: str) -> Callable[[int, Dials, Recipe], tuple[Layer, ...]]:
    """Layers of Based's language models, one each: its own convolution, rotary windows."""
    options: dict[str, Callable[[Dials], dict[str, Any]]] = {
        "gated_convolution": lambda dials: {},
        "taylor_linear_attention": lambda dials: {
            "num_heads": 1,
            "feature_dim": dials["feature_dim"],
        },
        "sliding_window_attention": lambda dials: {"num_heads": 1, "window": dials["window"]},
    }
    return lambda d, dials, recipe: tuple(Layer(name, options[name](dials)) for name in mixers)


_ALL = (
    Architecture(
        "attention",
        _behind_convolution(
            "softmax_attention",
            lambda d, dials, recipe: {
                "num_heads": 1,
                "rotary_fraction": 0.0,
                "bias": True,
                "attention_dropout": recipe.attention_dropout,
            },
        ),
        lambda d, dials, length: 2 * d * length + 3 * d,
        small_out=True,
    ),
    Architecture(
        "sliding_window",
        # A published window of w sees w keys back and the token itself.
        _behind_convolution(
            "sliding_window_attention",
            lambda d, dials, recipe: {
                "num_heads": 1,
                "window": dials["window"] + 1,
                "rotary_fraction": 0.0,
                "bias": True,
            },
        ),
        lambda d, dials, length: 2 * dials["window"] * d + 3 * d,
        {"window": 64},
        small_out=True,
    ),
    Architecture(
        "based",
        _behind_convolution(
            "taylor_linear_attention",
            lambda d, dials, recipe: {"num_heads": 1, "feature_dim": dials["feature_dim"]},
        ),
        lambda d, dials, length: (d + 1) * _features(dials["feature_dim"]) + 3 * d,
        {"feature_dim": 16},
    ),
    Architecture(
        "mamba",
        _twice("mamba", lambda d, dials, recipe: {"state_size": dials["state_size"]}),
        lambda d, dials, length: 4 * d * dials["state_size"],
        {"state_size": 16},
        block="mamba",
        tf32=False,
    ),
    Architecture(
        "mamba2",
        _twice("mamba2", lambda d, dials, recipe: {"state_size": dials["state_size"]}),
        lambda d, dials, length: 4 * d * dials["state_size"],
        {"state_size": 16},
        block="mamba",
        tf32=False,
    ),
    Architecture(
        "hyena",
        _twice("hyena", lambda d, dials, recipe: {"max_length": recipe.length}),
        lambda d, dials, length: 2 * d * length,
        small_out=True,
    ),
    Architecture(
        "h3",
        _twice("h3", lambda d, dials, recipe: {"state_size": d // 4, "head_dim": 2}),
        lambda d, dials, length: 2 * d * (d // 4),
    ),
    Architecture(
        "gla",
        _behind_convolution(
            "gated_linear_attention", lambda d, dials, recipe: {"num_heads": dials["num_heads"]}
        ),
        lambda d, dials, length: d // 2 * (d // dials["num_heads"]) + 3 * d,
        {"num_heads": 2},
    ),
    Architecture(
        "delta_net",
        _behind_convolution("delta_net", lambda d, dials, recipe: {"num_heads": 2}),
        lambda d, dials, length: d * d // 2 + 3 * d,
    ),
    Architecture(
        "gated_delta_net",
        _behind_convolution(
            "gated_delta_net", lambda d, dials, recipe: {"num_heads": 2, "output_gate": False}
        ),
        lambda d, dials, length: d * d + 3 * d,
    ),
    Architecture(
        "rwkv5",
        _behind_convolution("rwkv5", lambda d, dials, recipe: {"head_dim": 64}),
        lambda d, dials, length: d * 64 + 3 * d,
    ),
    Architecture(
        "rwkv7",
        _behind_convolution(
            "rwkv7",
            lambda d, dials, recipe: {
                "head_dim": 64,
                "decay_rank": 16,
                "rate_rank": 16,
                "gate_rank": 64,
            },
        ),
        lambda d, dials, length: d * 64 + 3 * d,
    ),
    *(_feature_map(name) for name in FEATURE_MAPS),
    Architecture(
        "shipped",
        _as_shipped("gated_convolution", "taylor_linear_attention", "sliding_window_attention"),
        dials={"feature_dim": 16, "window": 64},
    ),
    Architecture(
        "shipped_taylor",
        _as_shipped("gated_convolution", "taylor_linear_attention"),
        dials={"feature_dim": 16},
    ),
    Architecture(
        "shipped_window",
        _as_shipped("gated_convolution", "sliding_window_attention"),
        dials={"window": 64},
    ),
)

ARCHITECTURES: dict[str, Architecture] = {kind.name: kind for kind in _ALL}
