"""Mamba as its authors run it: mamba-ssm's model and fused kernels, where they are installed."""

from __future__ import annotations

from typing import Any

import torch

from based.models import DecoderConfig


def official_mamba(shape: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Any | None:
    """mamba-ssm's model of that size; None for another architecture, or without mamba-ssm."""
    if set(shape.mixers) != {"mamba"}:
        return None
    try:
        from mamba_ssm.models.config_mamba import (  # pyright: ignore[reportMissingImports]
            MambaConfig,
        )
        from mamba_ssm.models.mixer_seq_simple import (  # pyright: ignore[reportMissingImports]
            MambaLMHeadModel,
        )
    except ImportError:
        return None
    config = MambaConfig(
        d_model=shape.hidden_size, n_layer=len(shape.mixers), vocab_size=shape.vocab_size
    )
    return MambaLMHeadModel(config, device=device, dtype=dtype)
