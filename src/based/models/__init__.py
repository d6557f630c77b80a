"""Language models: one decoder, built from a list of mixer names."""

from based.models.auto_classes import register_auto_classes
from based.models.checkpoint import load_model, save_model
from based.models.config import DecoderConfig
from based.models.decoder import Decoder, DecoderState
from based.models.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Decoder",
    "DecoderConfig",
    "DecoderState",
    "load_model",
    "preset",
    "save_model",
]

register_auto_classes()
