"""Sequence mixers: every one maps `[B, T, hidden_size]` to the same shape, causally."""

from based.mixers.base import CANONICAL, Layout, Mixer, TensorSpec
from based.mixers.registry import MIXERS, build_mixer
from based.mixers.state import State

__all__ = ["CANONICAL", "MIXERS", "Layout", "Mixer", "State", "TensorSpec", "build_mixer"]
