"""Generation on the constant-size state: the engine, sampling, and one-call helpers."""

from based.generation.config import EngineConfig
from based.generation.decoding import generate, stream, stream_text
from based.generation.engine import Engine
from based.generation.prefill import prefill
from based.generation.request import Generation, Snapshot
from based.generation.sampling import Sampling

__all__ = [
    "Engine",
    "EngineConfig",
    "Generation",
    "Sampling",
    "Snapshot",
    "generate",
    "prefill",
    "stream",
    "stream_text",
]
