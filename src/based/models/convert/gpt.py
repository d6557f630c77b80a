"""The official Based and Transformer++ checkpoints: one GPT class, a mixer chosen for each layer.

Every dial is read from their config.json, widths from the tensors themselves.
Source: the official repository's `based/models/gpt.py` and its mixers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from based.errors import BasedError
from based.models.config import DecoderConfig
from based.models.convert.tensors import Mapped, rename
from based.models.presets import CONVOLUTION, LINEAR, SOFTMAX, WINDOW
from based.ops.sliding_window_attention import window_from_official

LAYER = r"transformer\.layers\.(\d+)\."
RULES = {
    r"transformer\.embeddings\.word_embeddings\.weight": "embedding.weight",
    r"transformer\.ln_f\.weight": "norm.weight",
    LAYER + r"norm1\.weight": r"blocks.\1.mixer_norm.weight",
    LAYER + r"norm2\.weight": r"blocks.\1.mlp_norm.weight",
    # Both halves of fc1 are in our order: the value, then the gate that SiLU acts on.
    LAYER + r"mlp\.(fc1|fc2)\.weight": r"blocks.\1.mlp.\2.weight",
    LAYER + r"mixer\.Wqkv\.weight": r"blocks.\1.mixer.qkv_proj.weight",
    LAYER + r"mixer\.proj_([qkv])\.weight": r"blocks.\1.mixer.\2_proj.weight",
    LAYER + r"mixer\.conv\.conv\.weight": r"blocks.\1.mixer.conv_weight",
    LAYER + r"mixer\.(in_proj|out_proj)\.(weight|bias)": r"blocks.\1.mixer.\2.\3",
}
UNNEEDED = {
    r".*metrics.*": "a counter of the training run",
    r"lm_head\.weight": "the embedding again (tied)",
    r"transformer\.decay\.decay": "a buffer that no official mixer reads",
    r".*rotary_emb\.inv_freq": "computed here, not stored",
}
# What our models have fixed: the official name, its default where absent, and what it must be.
FIXED: dict[str, tuple[Any, Any]] = {
    "activation_function": ("gelu_new", "swiglu"),
    "rms_norm": (False, True),
    "prenorm": (True, True),
    "parallel_block": (False, False),
    "mlp_type": ("base", "base"),
    "tie_word_embeddings": (True, True),
    "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False),
    "rotary_emb_base": (10000.0, 10000.0),
    "rotary_emb_scale_base": (None, None),
    "rotary_emb_interleaved": (False, False),
    "n_head_kv": (None, None),
    "attn_dwconv": (False, False),
    "use_alibi": (False, False),
    "norm_head": (False, False),
    "mup_attn_multiplier": (1.0, 1.0),
    "mup_embeddings_multiplier": (1.0, 1.0),
    "mup_output_multiplier": (1.0, 1.0),
    "mup_scale_qk_dot_by_d": (False, False),
    "mup_width_scale": (1.0, 1.0),
}
# Names that GPT2Config has for the same value.
ALIASES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}


def convert(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapped:
    """Our configuration and tensors for an official GPT checkpoint's."""
    values = _flat(values)
    for name, (default, wanted) in FIXED.items():
        if values.get(name, default) != wanted:
            raise BasedError(
                f"config.json has {name} {values.get(name, default)!r}; models here have {wanted!r}"
            )
    tensors = _untied(tensors)
    ours, renamed, dropped = rename(tensors, RULES, UNNEEDED)
    for name, tensor in ours.items():
        if name.endswith("conv_weight"):
            ours[name] = tensor.squeeze(1)
    config, dials = _config(values, ours)
    return Mapped(config, ours, renamed, dropped, dials)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own settings, whether config.json holds them alone or inside a run's."""
    for key in ("model", "config"):
        if isinstance(values.get(key), Mapping):
            values = values[key]
    return {ALIASES.get(name, name): value for name, value in values.items()}


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the embedding, which a file of shared tensors may hold as the head alone."""
    embedding, head = "transformer.embeddings.word_embeddings.weight", "lm_head.weight"
    tensors = dict(tensors)
    if embedding not in tensors and head in tensors:
        tensors[embedding] = tensors.pop(head)
    elif head in tensors and not _same(tensors[head], tensors[embedding]):
        raise BasedError("lm_head.weight is not the embedding; models here tie the two")
    return tensors


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.device.type == "meta" or torch.equal(a, b))


def _config(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[DecoderConfig, dict[str, str]]:
    hidden_size, num_heads = _number(values, "n_embd"), _number(values, "n_head")
    options: dict[str, dict[str, Any]] = {}
    mixers, dials = [], {}
    for layer in range(_number(values, "n_layer")):
        slot = _slot(values, layer)
        name, dial, origin = _mixer(values, slot, num_heads, hidden_size // num_heads)
        if name == CONVOLUTION:
            dial, origin = _convolution(tensors, layer, hidden_size)
        if options.setdefault(name, dial) != dial:
            raise BasedError(f"layers of {name} differ ({options[name]}, {dial}); here they agree")
        mixers.append(name)
        dials[name] = origin
    vocab_size = _rows(tensors, "embedding.weight")
    fc1 = _rows(tensors, "blocks.0.mlp.fc1.weight")
    if vocab_size < _number(values, "vocab_size", 50257):
        raise BasedError(f"the embedding has {vocab_size} rows, config.json says more tokens")
    dials["vocab_size"] = f"rows of the embedding; {values.get('vocab_size', 50257)} and padding"
    dials["intermediate_size"] = "half the rows of fc1"
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fc1 // 2,
        mixers=tuple(mixers),
        mixer_options=options,
        norm_eps=float(values.get("layer_norm_epsilon", 1e-5)),
        initializer_range=float(values.get("initializer_range", 0.02)),
    )
    return config, dials


def _slot(values: Mapping[str, Any], layer: int) -> str:
    """Which of the config's mixers the layer has; the second alternative goes first."""
    for slot in ("alt_mixer_2", "alt_mixer"):
        if layer in (values.get(f"{slot}_layers") or ()):
            return slot
    return "mixer"


def _mixer(
    values: Mapping[str, Any], slot: str, num_heads: int, head_dim: int
) -> tuple[str, dict[str, Any], str]:
    """Our mixer's name, its options, and where in config.json they are."""
    mixer = values.get(slot)
    fraction = float(values.get("rotary_emb_fraction", 0.0))
    if int(values.get("head_dim") or head_dim) != head_dim:
        raise BasedError(f"config.json has head_dim {values['head_dim']}; here it is {head_dim}")
    if mixer is None:
        if tuple(values.get("window_size") or (-1, -1)) != (-1, -1):
            raise BasedError(f"attention with window_size {values['window_size']} is not known")
        options = {"num_heads": num_heads, "rotary_fraction": fraction}
        return SOFTMAX, options, "n_head, rotary_emb_fraction"
    kind = str(mixer.get("_target_", "")).rsplit(".", 1)[-1]
    if kind == "BaseConv":
        return CONVOLUTION, {}, ""
    if kind == "LinearAttention":
        return LINEAR, _linear(mixer, slot), f"{slot}.num_heads, .feature_dim"
    if kind == "SlidingAttention":
        if int(fraction * head_dim) != head_dim:
            raise BasedError(
                f"rotary_emb_fraction is {fraction}; window layers here rotate whole heads"
            )
        window = window_from_official(_number(mixer, "window_size", 128))
        # The official code gives these layers the model's heads, whatever the mixer says.
        options = {"num_heads": num_heads, "window": window}
        return WINDOW, options, f"n_head, {slot}.window_size // 2 past keys and the query's own"
    raise BasedError(f"config.json has {slot} {mixer.get('_target_')!r}, which is not known here")


def _linear(mixer: Mapping[str, Any], slot: str) -> dict[str, Any]:
    feature_map = str((mixer.get("feature_map") or {}).get("_target_", "TaylorExp"))
    if not feature_map.endswith("TaylorExp"):
        raise BasedError(f"{slot} has feature map {feature_map!r}; here it is TaylorExp")
    return {
        "num_heads": _number(mixer, "num_heads", 16),
        "feature_dim": _number(mixer, "feature_dim", 16),
    }


def _convolution(
    tensors: Mapping[str, Tensor], layer: int, hidden_size: int
) -> tuple[dict[str, Any], str]:
    """From the tensor: the config's `kernel_sizes` is a name that the official code ignores."""
    name = f"blocks.{layer}.mixer.conv_weight"
    inner, kernel = _rows(tensors, name), tensors[name].shape[-1]
    return {"kernel_size": kernel, "expand": inner // hidden_size}, "the convolution's shape"


def _rows(tensors: Mapping[str, Tensor], name: str) -> int:
    if name not in tensors:
        raise BasedError(f"the checkpoint lacks our {name}; is the file whole?")
    return tensors[name].shape[0]


def _number(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name, default)
    if isinstance(value, str) and re.fullmatch(r"\d+", value):
        value = int(value)
    if not isinstance(value, int) or value < 1:
        raise BasedError(f"config.json has {name} {value!r}; it must be a positive number")
    return value
