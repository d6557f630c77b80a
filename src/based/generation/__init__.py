"""Generation on the constant-size state: sampling, prefill and the token-by-token loop."""

from based.generation.decoding import generate, prefill, stream
from based.generation.sampling import Sampling, sample
from based.generation.text import stream_text

__all__ = ["Sampling", "generate", "prefill", "sample", "stream", "stream_text"]
