"""From tokens to text as they come: decoding of partial characters, stop strings."""

from based.data.tokenizer import StreamDecoder, Tokenizer


class StopStrings:
    """Lets text through up to the first stop string, which is not part of it.

    Text that may turn out to begin a stop string is held back until it cannot.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop, self._held, self.found = stop, "", False

    def feed(self, piece: str) -> str:
        """The text that is certain now; `found` says whether it is the last."""
        held = self._held + piece
        ends = [found for s in self._stop if (found := held.find(s)) >= 0]
        if ends:
            self._held, self.found = "", True
            return held[: min(ends)]
        keep = max((_overlap(held, s) for s in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of one sequence's tokens, with its stop strings; `take` reads it."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._decoder, self._stop = StreamDecoder(tokenizer), StopStrings(stop)
        self._ready = ""

    def feed(self, token: int) -> bool:
        """Adds a token; whether its text completes a stop string."""
        self._ready += self._stop.feed(self._decoder.feed(token))
        return self._stop.found

    def finish(self) -> None:
        """The sequence has ended: what was held back is certain."""
        if not self._stop.found:
            self._ready += self._stop.feed(self._decoder.flush())
        self._ready += self._stop.flush()

    def take(self) -> str:
        """The text that has become certain since the last call."""
        ready, self._ready = self._ready, ""
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
