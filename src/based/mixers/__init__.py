"""Sequence mixers: every one maps `[B, T, hidden_size]` to the same shape, causally."""

from based.mixers.base import Mixer, TensorSpec
from based.mixers.registry import MIXERS, build_mixer
from based.mixers.state import State

__all__ = ["MIXERS", "Mixer", "State", "TensorSpec", "build_mixer"]
