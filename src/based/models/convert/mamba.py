"""The official Mamba checkpoints, and all of their layout: Mamba and Mamba-2 of state-spaces.

Sizes are read from the tensors; the config.json only has to agree with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from based.errors import BasedError
from based.models.config import DecoderConfig
from based.models.convert.tensors import Mapped, rename

LAYER = r"backbone\.layers\.(\d+)\."
# transformers' copies of the checkpoints say `embeddings`.
EMBEDDINGS = ("backbone.embedding.weight", "backbone.embeddings.weight")
RULES = {
    r"backbone\.embeddings?\.weight": "embedding.weight",
    r"backbone\.norm_f\.weight": "norm.weight",
    LAYER + r"norm\.weight": r"blocks.\1.mixer_norm.weight",
    LAYER + r"mixer\.conv1d\.(weight|bias)": r"blocks.\1.mixer.conv.\2",
    LAYER + r"mixer\.dt_proj\.(weight|bias)": r"blocks.\1.mixer.dt_\2",
    LAYER + r"mixer\.norm\.weight": r"blocks.\1.mixer.norm_weight",
    LAYER + r"mixer\.(in_proj|x_proj|out_proj)\.weight": r"blocks.\1.mixer.\2.weight",
    LAYER + r"mixer\.(A_log|D|dt_bias)": r"blocks.\1.mixer.\2",
}
UNNEEDED = {
    r".*metrics.*": "a counter of the training run",
    r"lm_head\.weight": "the embedding again (tied)",
}
# What our models have fixed: its default where the config.json lacks it, and what it must be.
FIXED: dict[str, tuple[Any, Any]] = {
    "rms_norm": (True, True),
    "tie_embeddings": (True, True),
    "d_intermediate": (0, 0),
    "attn_layer_idx": ([], []),
    "ngroups": (1, 1),
    "n_groups": (1, 1),
    "norm_before_gate": (False, False),
}


def convert(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapped:
    """Our configuration and tensors for a checkpoint with the state-spaces key layout."""
    values = {**values, **(values.get("ssm_cfg") or {})}
    for name, (default, wanted) in FIXED.items():
        if values.get(name, default) != wanted:
            raise BasedError(
                f"config.json has {name} {values[name]!r}; Mamba models here have {wanted!r}"
            )
    _check_tied(tensors)
    ours, renamed, dropped = rename(tensors, RULES, UNNEEDED)
    for name, tensor in ours.items():
        if name.endswith("conv.weight"):
            ours[name] = tensor.squeeze(1)
    config = _config(values, ours)
    dials = dict.fromkeys((config.mixers[0], "vocab_size"), "the tensors' shapes")
    return Mapped(config, ours, renamed, dropped, dials)


def _check_tied(tensors: Mapping[str, Tensor]) -> None:
    head = tensors.get("lm_head.weight")
    embeddings = [tensors[name] for name in EMBEDDINGS if name in tensors]
    if head is not None and not all(torch.equal(head, embedding) for embedding in embeddings):
        raise BasedError("lm_head.weight is not the embedding; models here tie the two")


def _config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DecoderConfig:
    vocab_size, hidden_size = _shape(tensors, "embedding.weight")
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    for name, found in (("d_model", hidden_size), ("n_layer", layers)):
        if values.get(name, found) != found:
            raise BasedError(f"config.json has {name} {values[name]}, the tensors {found}")
    mixer = "mamba" if "blocks.0.mixer.x_proj.weight" in tensors else "mamba2"
    options = (_mamba if mixer == "mamba" else _mamba2)(tensors, hidden_size)
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=0,
        mixers=(mixer,) * layers,
        mixer_options={mixer: options},
    )


def _mamba(tensors: Mapping[str, Tensor], hidden_size: int) -> dict[str, int]:
    inner, state_size = _shape(tensors, "blocks.0.mixer.A_log")
    return {
        "state_size": state_size,
        "conv_size": _shape(tensors, "blocks.0.mixer.conv.weight")[-1],
        "expand": inner // hidden_size,
        "dt_rank": _shape(tensors, "blocks.0.mixer.dt_weight")[-1],
    }


def _mamba2(tensors: Mapping[str, Tensor], hidden_size: int) -> dict[str, int]:
    (heads,) = _shape(tensors, "blocks.0.mixer.A_log")
    inner = _shape(tensors, "blocks.0.mixer.out_proj.weight")[-1]
    channels, conv_size = _shape(tensors, "blocks.0.mixer.conv.weight")
    return {
        "state_size": (channels - inner) // 2,
        "head_dim": inner // heads,
        "conv_size": conv_size,
        "expand": inner // hidden_size,
    }


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise BasedError(f"the checkpoint lacks our {name}; is the file whole?")
    return tuple(tensors[name].shape)
