"""From prompt text to streamed text: decoding of partial characters, stop strings."""

from collections.abc import Iterable, Iterator

from based.data.tokenizer import StreamDecoder, Tokenizer
from based.generation.decoding import stream
from based.generation.sampling import Sampling
from based.models import Decoder


def stream_text(
    model: Decoder, tokenizer: Tokenizer, prompt: str, sampling: Sampling
) -> Iterator[str]:
    """Yields the continuation of `prompt` in pieces, as soon as each is certain."""
    tokens = stream(model, tokenizer.encode(prompt), sampling, tokenizer.eos_id)
    return until_stop(_decoded(tokens, tokenizer), sampling.stop)


def until_stop(pieces: Iterable[str], stop: tuple[str, ...]) -> Iterator[str]:
    """The pieces' text up to the first stop string, which is not part of it.

    Text that may turn out to begin a stop string is held back until it cannot.
    """
    held = ""
    for piece in pieces:
        held += piece
        ends = [found for s in stop if (found := held.find(s)) >= 0]
        if ends:
            yield held[: min(ends)]
            return
        keep = max((_overlap(held, s) for s in stop), default=0)
        if keep < len(held):
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _decoded(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    decoder = StreamDecoder(tokenizer)
    for token in tokens:
        yield decoder.feed(token)
    yield decoder.flush()
