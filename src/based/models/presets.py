"""Presets: functions that return a `DecoderConfig`, by the names users type.

The dials are arguments. `window` counts the keys a query sees, itself included.
"""

from collections.abc import Callable

from based.errors import BasedError
from based.models.config import DecoderConfig

CONVOLUTION, LINEAR, WINDOW, SOFTMAX, MAMBA = (
    "gated_convolution",
    "taylor_linear_attention",
    "sliding_window_attention",
    "softmax_attention",
    "mamba",
)


def based_model(
    hidden_size: int,
    num_layers: int,
    linear_layers: tuple[int, ...],
    window_layers: tuple[int, ...],
    *,
    num_heads: int = 16,
    feature_dim: int = 16,
    window: int = 129,
    vocab_size: int = 50264,
) -> DecoderConfig:
    """Based: convolutions with a few linear-attention and window layers (paper section 4.2)."""
    mixers = [CONVOLUTION] * num_layers
    for layers, name in ((linear_layers, LINEAR), (window_layers, WINDOW)):
        for layer in layers:
            mixers[layer] = name
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        mixers=tuple(mixers),
        mixer_options={
            LINEAR: {"num_heads": num_heads, "feature_dim": feature_dim},
            WINDOW: {"num_heads": num_heads, "window": window},
        },
    )


def transformer_model(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    *,
    rotary_fraction: float = 0.5,
    num_kv_heads: int | None = None,
    vocab_size: int = 50272,
) -> DecoderConfig:
    """Transformer++: rotary softmax attention and SwiGLU in every layer."""
    options: dict[str, float] = {"num_heads": num_heads, "rotary_fraction": rotary_fraction}
    if num_kv_heads is not None:
        options["num_kv_heads"] = num_kv_heads
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        mixers=(SOFTMAX,) * num_layers,
        mixer_options={SOFTMAX: options},
    )


def mamba_model(
    hidden_size: int, num_layers: int, *, state_size: int = 16, vocab_size: int = 50288
) -> DecoderConfig:
    """Mamba: a selective state space in every layer, and no MLP."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=0,
        mixers=(MAMBA,) * num_layers,
        mixer_options={MAMBA: {"state_size": state_size}},
    )


def transformer_of_size(parameters: int, hidden_size: int, vocab_size: int) -> DecoderConfig:
    """The Transformer++ of that width with about that many parameters."""
    intermediate_size = -(-int(8 * hidden_size / 3) // 256) * 256
    per_layer = hidden_size * (4 * hidden_size + 3 * intermediate_size)
    num_layers = max(1, round((parameters - vocab_size * hidden_size) / per_layer))
    return transformer_model(hidden_size, num_layers, 1, intermediate_size, vocab_size=vocab_size)


def based_360m(feature_dim: int = 16, window: int = 129) -> DecoderConfig:
    """The official 360M configuration: 362,620,928 parameters, window_size 256."""
    return based_model(
        1024, 27, (1, 6, 11, 16, 21), (2, 7, 12, 17, 22), feature_dim=feature_dim, window=window
    )


def based_1_3b(feature_dim: int = 16, window: int = 129) -> DecoderConfig:
    """The official 1.3B configuration: 1,349,453,056 parameters, head_dim 112."""
    linear, windows = (1, 6, 11, 16, 21, 27, 33), (2, 7, 12, 17, 22, 28, 34)
    return based_model(1792, 36, linear, windows, feature_dim=feature_dim, window=window)


def attn_360m() -> DecoderConfig:
    """The official Transformer++ baseline at 360M."""
    return transformer_model(1024, 24, num_heads=16, intermediate_size=2816)


def attn_1_3b() -> DecoderConfig:
    """The official Transformer++ baseline at 1.3B: head_dim 70, of which 36 rotate."""
    return transformer_model(1680, 36, num_heads=24, intermediate_size=4608)


def attn_1_3b_hd128() -> DecoderConfig:
    """Transformer++ at 1.3B with heads of 128, which hardware likes: the fair one for speed."""
    return transformer_model(1664, 36, num_heads=13, intermediate_size=4608)


def attn_1_3b_gqa() -> DecoderConfig:
    """Transformer++ at 1.3B whose 14 query heads share 2 heads of keys and values."""
    return transformer_model(1792, 36, num_heads=14, intermediate_size=4992, num_kv_heads=2)


def mamba_360m() -> DecoderConfig:
    """The official Mamba baseline at 360M."""
    return mamba_model(1024, 46)


def mamba_1_3b() -> DecoderConfig:
    """The official Mamba baseline at 1.3B."""
    return mamba_model(2048, 46)


def based_tiny(feature_dim: int = 16, window: int = 17, vocab_size: int = 2048) -> DecoderConfig:
    """Based for two CPU cores: 4 layers of width 96."""
    dials = {"feature_dim": feature_dim, "window": window, "vocab_size": vocab_size}
    return based_model(96, 4, (1,), (2,), num_heads=4, **dials)


def window_tiny(window: int = 17, vocab_size: int = 2048) -> DecoderConfig:
    """`based-tiny` with a window in place of linear attention: exact, and forgetful."""
    return based_model(96, 4, (), (1, 2), num_heads=4, window=window, vocab_size=vocab_size)


def attn_tiny(vocab_size: int = 2048) -> DecoderConfig:
    """Transformer++ of the size of `based-tiny`."""
    return transformer_model(
        96, 4, num_heads=4, intermediate_size=220, rotary_fraction=1.0, vocab_size=vocab_size
    )


PRESETS: dict[str, Callable[..., DecoderConfig]] = {
    "based-360m": based_360m,
    "based-1.3b": based_1_3b,
    "attn-360m": attn_360m,
    "attn-1.3b": attn_1_3b,
    "attn-1.3b-hd128": attn_1_3b_hd128,
    "attn-1.3b-gqa": attn_1_3b_gqa,
    "mamba-360m": mamba_360m,
    "mamba-1.3b": mamba_1_3b,
    "based-tiny": based_tiny,
    "window-tiny": window_tiny,
    "attn-tiny": attn_tiny,
}


def preset(name: str, **dials: int | None) -> DecoderConfig:
    """The named preset with the given dials; a dial of None keeps the preset's own value."""
    if name not in PRESETS:
        raise BasedError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}")
    given = {dial: value for dial, value in dials.items() if value is not None}
    try:
        return PRESETS[name](**given)
    except TypeError as error:
        raise BasedError(f"preset {name} has no such dial: {error}") from error
