"""Drawing the next token of every row: temperature, top-k, top-p, a counter-based generator."""

from based.ops.token_sampling.draw import Drawn, SamplingRows, sample_tokens

__all__ = ["Drawn", "SamplingRows", "sample_tokens"]
