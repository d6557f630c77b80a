"""Who is next: first come, first served, with a bounded share of time for prompts."""

from __future__ import annotations

from collections import deque

from based.errors import BasedError
from based.generation.request import Generation

# Where steps are not counted, decoding has so many times as long as the call before took: meanwhile
# more prompts come together, of which a call has less trouble each. Some calls take much longer
# than the next ones will (kernels are compiled), so there is a last step.
DECODE_PER_PREFILL, MOST_STEPS = 2.0, 64


class Scheduler:
    """The queue of requests, and the pace at which their prompts are read.

    While sequences decode, `decode_per_prefill` decode steps stand between two calls
    that read prompts, each of at most `chunk` tokens, or (None) up to 64 of those that fit
    in twice the time that the call took: long prompts, or many of them, slow others down
    by a bounded factor. A prompt that is longer than a chunk is read alone; shorter ones
    are read up to `rows` together.
    """

    def __init__(
        self, chunk: int, rows: int, decode_per_prefill: int | None, max_waiting: int
    ) -> None:
        self._chunk, self._rows = chunk, rows
        self._decode_per_prefill, self._max_waiting = decode_per_prefill, max_waiting
        self._waiting: deque[Generation] = deque()
        # Steps, and seconds, since prompts were read, and seconds that it took.
        self._steps, self._seconds, self._read_seconds = decode_per_prefill or 0, 0.0, 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, generation: Generation) -> None:
        """To the back of the queue; refused when the queue is full."""
        if len(self._waiting) >= self._max_waiting:
            raise BasedError(
                f"{self._max_waiting} requests are waiting already; try again when some are done"
            )
        self._waiting.append(generation)

    def put_back(self, generation: Generation) -> None:
        """To the back of the queue, though it be full: it was admitted before."""
        self._waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """Out of the queue, if it is there."""
        if generation in self._waiting:
            self._waiting.remove(generation)

    def prompts_turn(self, decoding: bool) -> bool:
        """Whether a prompt may be read now, given whether sequences decode."""
        if not decoding:
            return True
        if self._decode_per_prefill is not None:
            return self._steps >= self._decode_per_prefill
        enough = DECODE_PER_PREFILL * self._read_seconds
        return self._seconds >= enough or self._steps >= MOST_STEPS

    def count_round(self, seconds: float, *, read: bool) -> None:
        """A round took so long: if it did not read prompts, they come nearer their turn."""
        if read:
            self._steps, self._seconds, self._read_seconds = 1, 0.0, seconds
        else:
            self._steps, self._seconds = self._steps + 1, self._seconds + seconds

    def next_parked(self) -> Generation | None:
        """The first in the queue, if its state only needs a slot to go on."""
        return self._waiting.popleft() if self._waiting and self._waiting[0].parked else None

    def next_group(self, free: int) -> list[Generation]:
        """Those whose prompts are read in the next call, in order; none without a free slot."""
        group: list[Generation] = []
        total = 0
        while self._waiting and len(group) < min(free, self._rows):
            first = self._waiting[0]
            total += len(first.prompt)
            alone = len(first.prompt) > self._chunk or first.carry is not None
            if group and (alone or total > self._chunk):
                break
            group.append(self._waiting.popleft())
            if alone:
                break
        return group
