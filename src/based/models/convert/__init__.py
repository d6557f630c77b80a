"""The published checkpoints become ours: one module for each family of official models."""

from based.models.convert.conversion import convert
from based.models.convert.source import Source

__all__ = ["Source", "convert"]
