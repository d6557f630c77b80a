"""Drawing the next token of every row: temperature, top-k, top-p, a counter-based generator."""

from based.ops.token_sampling.draw import SamplingRows, sample_tokens
from based.ops.token_sampling.drawn import Drawn, Outbox

__all__ = ["Drawn", "Outbox", "SamplingRows", "sample_tokens"]
