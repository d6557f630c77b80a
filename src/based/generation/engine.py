"""The engine: many sequences decoded together, each in a slot of fixed memory.

A round (`Engine.step`) reads at most one group of prompts and then takes one decode
step for all sequences at once. Sequences join and leave between steps. The host
learns of a token one step after it was drawn, while the device is at the next one:
what is drawn after a sequence's end is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from time import perf_counter

import torch
from torch import Tensor

from based.data.tokenizer import Tokenizer
from based.errors import BasedError
from based.generation.config import EngineConfig, slot_count
from based.generation.padded_prompts import PaddedPrompts
from based.generation.pool import StatePool
from based.generation.prefill import read_chunk, read_together
from based.generation.quantization import quantize_step
from based.generation.request import Generation, Snapshot
from based.generation.sampling import Sampling, sampling_rows, to_device
from based.generation.scheduler import Scheduler
from based.generation.step import DecodeStep, Report, step_sizes
from based.generation.text import TextStream
from based.models import Decoder, DecoderState
from based.ops.kernels import use_kernels
from based.ops.token_sampling import Drawn, SamplingRows, sample_tokens


class Engine:
    """Runs requests on a model. One thread drives it, by `step` or by reading a stream.

    On a CPU every step has one shape, so that a request's tokens are the same bits
    whatever runs beside it; on a GPU that holds within one batch size, or always
    with `deterministic`.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig | None = None,
        *,
        eos_id: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.model, self._tokenizer = model, tokenizer
        self._eos_id = tokenizer.eos_id if tokenizer is not None else eos_id
        cuda = model.device.type == "cuda"
        # Steps without kernels (float64) look at their data, and cannot be captured.
        graphs = cuda and use_kernels(model.embedding.weight)
        slots = slot_count(model, self.config)
        self._one_shape = self.config.deterministic or not cuda
        padded, room = graphs and PaddedPrompts.reads(model), self.config.max_length
        self.pool = StatePool(model, slots, room, self.config.recent, spare=padded)
        sizes = [slots] if self._one_shape else step_sizes(slots, self.config.step_sizes)
        if self.config.quantize is not None:
            quantize_step(model, self.config.quantize)
        self._decode = DecodeStep(model, self.pool.state, sizes, graphs=graphs)
        self._decode.check()
        self.pool.wipe()
        self._chunk = self.config.tokens_together(cuda)
        together = min(slots, self.config.prompts_together(cuda))
        per_prefill, waiting = self.config.decode_per_prefill, self.config.max_waiting
        self._scheduler = Scheduler(self._chunk, together, per_prefill, waiting)
        self._padded = PaddedPrompts(model, self.pool, self._chunk, together) if padded else None
        self._running: dict[int, Generation] = {}
        self._reading: tuple[int, Generation] | None = None
        self._reports: list[Report] = []
        if graphs:
            self._compile(together)

    @torch.no_grad()
    def _compile(self, together: int) -> None:
        """Kernels that a first prompt would wait for: of a read, of one first draw and of many."""
        if self._padded is not None:
            self._padded.compile()
        embedding = self.model.embedding.weight
        for rows in {1, together}:
            options = self._options([Generation([0], Sampling())] * rows)
            sample_tokens(self.model.logits(embedding[:1].expand(rows, -1)), options)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        after: Snapshot | None = None,
        max_unread: int | None = None,
    ) -> Generation:
        """Queues a request; an empty prompt begins a new document, as one end-of-text token.

        `after` continues a snapshot with the prompt. A caller that leaves more than
        `max_unread` tokens untaken loses its slot.
        """
        tokens = [*(after.pending if after else ()), *prompt]
        if not tokens and self._eos_id is not None:
            tokens = [self._eos_id]
        generation = self._request(tokens, sampling, after.length if after else 0)
        generation.max_unread, generation.carry = max_unread, after.state if after else None
        self._scheduler.add(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Ends a request at once, wherever it is; what it has is kept."""
        if not generation.finished:
            self._vacate(generation)
            generation.finish("cancelled")

    def preempt(self, generation: Generation) -> None:
        """Puts a decoding sequence aside, into host memory, and at the back of the queue.

        It goes on later as if nothing had happened, to the bit. One that does not decode
        is left alone.
        """
        row = self._row_of(generation)
        if row is not None:
            parked = DecoderState(layer.to("cpu") for layer in self.pool.read(row))
            self._vacate(generation)
            generation.carry, generation.parked = parked, True
            self._scheduler.put_back(generation)

    def fork(self, generation: Generation, sampling: Sampling) -> Generation:
        """A new request that goes on from where a decoding one is, with options of its own."""
        row = self._decoding_row(generation)
        twin = self._request([*generation.prompt, *generation.tokens], sampling, 0)
        twin.carry, twin.parked = self.pool.read(row), True
        self._scheduler.add(twin)
        return twin

    def snapshot(self, generation: Generation) -> Snapshot:
        """The canonical state of a decoding request, for `submit(after=...)`, any number of times.

        It fits engines of the same model and `max_length`.
        """
        row = self._decoding_row(generation)
        length = generation.seen + len(generation.prompt) + len(generation.tokens) - 1
        return Snapshot(self.pool.canonical(row), (generation.tokens[-1],), length)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        held = self._running or self._reading or self._reports
        return bool(held) or len(self._scheduler) > 0

    @torch.no_grad()
    def step(self) -> None:
        """One round: prompts if it is their turn, then one token for all that decode."""
        began = perf_counter()
        self._resume_parked()
        turn = self._scheduler.prompts_turn(decoding=bool(self._running))
        read = turn and self._read_prompts()
        if self._running:
            self._launch()
        # The newest report stays out, so that the device always has a step ahead of it.
        self._collect(keep=1 if self._running else 0)
        self._scheduler.count_round(perf_counter() - began, read=read)

    def stream(self, generation: Generation) -> Iterator[int]:
        """The request's tokens as they come; drives the engine. Stopping early cancels it."""
        try:
            while not generation.finished:
                self.step()
                yield from generation.take()
        finally:
            self.cancel(generation)
        generation.raise_error()

    def stream_text(self, generation: Generation) -> Iterator[str]:
        """The request's text as it becomes certain; needs the engine's tokenizer."""
        assert generation.text is not None
        for _ in self.stream(generation):
            if piece := generation.text.take():
                yield piece
        if piece := generation.text.take():
            yield piece

    def _request(self, tokens: list[int], sampling: Sampling, seen: int) -> Generation:
        """Checks what can be known of a request before it queues."""
        if not tokens:
            raise BasedError("the prompt has no tokens; begin with the end-of-text token")
        vocab_size = self.model.config.vocab_size
        strange = [token for token in tokens if not 0 <= token < vocab_size]
        if strange:
            raise BasedError(
                f"the prompt holds token id {strange[0]}, but the model's vocabulary is "
                f"0 .. {vocab_size - 1}; use the tokenizer that the model was trained with"
            )
        length = seen + len(tokens) + sampling.max_new_tokens
        fixed = all(mixer.fixed_state for mixer in self.model.mixers())
        if not fixed and length > self.config.max_length:
            raise BasedError(
                f"prompt and new tokens are {length:,} together; this engine's slots hold "
                f"{self.config.max_length:,}: raise max_length, or ask for fewer"
            )
        if sampling.stop and self._tokenizer is None:
            raise BasedError("stop strings need the engine to have the model's tokenizer")
        text = None if self._tokenizer is None else TextStream(self._tokenizer, sampling.stop)
        return Generation(tokens, sampling, self._eos_id, text, seen=seen)

    def _row_of(self, generation: Generation) -> int | None:
        """The row of a request that decodes, after all its tokens have arrived."""
        self._collect(keep=0)
        rows = [row for row, running in self._running.items() if running is generation]
        return rows[0] if rows else None

    def _decoding_row(self, generation: Generation) -> int:
        row = self._row_of(generation)
        if row is None:
            raise BasedError("the request is not decoding; only one that is has a state to copy")
        return row

    def _vacate(self, generation: Generation) -> None:
        """Takes a request out of the queue, or out of its slot."""
        self._scheduler.remove(generation)
        if self._reading is not None and self._reading[1] is generation:
            self.pool.release(self._reading[0])
            self._reading = None
        for row in [row for row, running in self._running.items() if running is generation]:
            del self._running[row]
            self.pool.release(row)

    def _resume_parked(self) -> None:
        while self.pool.free and (generation := self._scheduler.next_parked()) is not None:
            assert generation.carry is not None
            row, last = self.pool.acquire(), (generation.tokens or generation.prompt)[-1]
            self.pool.load([row], generation.carry)
            tokens = to_device(torch.tensor([last]), self.model.device)
            self._decode.set_rows([row], tokens, self._options([generation]))
            self._running[row] = generation
            generation.carry, generation.parked = None, False

    def _read_prompts(self) -> bool:
        """One call over prompts: the next chunk of a long one, or a group of short ones.

        False if there was none to read.
        """
        if self._reading is None:
            group = self._scheduler.next_group(self.pool.free)
            if not group:
                return False
            rows = [self.pool.acquire() for _ in group]
            if len(group) > 1 or self._padded_for(group) is not None:
                self._read_group(rows, group)
                return True
            self._reading = (rows[0], group[0])
        self._read_on()
        return True

    def _padded_for(self, group: list[Generation]) -> PaddedPrompts | None:
        """What reads these in a captured shape, if anything does."""
        return self._padded if self._padded is not None and self._padded.takes(group) else None

    def _read_group(self, rows: list[int], group: list[Generation]) -> None:
        """Reads whole prompts together or, where memory does not suffice, one by one."""
        with suppress(torch.OutOfMemoryError):
            if (padded := self._padded_for(group)) is not None:
                hidden = padded.read(rows, group)
            else:
                hidden, state = read_together(self.model, group)
                self.pool.load(rows, state)
            self._begin(rows, group, hidden)
            return
        # Only here is the memory of the failed call free, and that of captured ones given up.
        self._padded = None
        for self._reading in zip(rows, group, strict=True):
            self._read_on()

    def _read_on(self) -> None:
        """The next chunk of the prompt being read; a request too large for memory ends."""
        assert self._reading is not None
        row, generation = self._reading
        try:
            hidden = read_chunk(self.model, generation, self._chunk)
        except torch.OutOfMemoryError:
            self._vacate(generation)
            generation.finish("error", "not enough memory to read the prompt")
            return
        if generation.fed == len(generation.prompt):
            assert generation.carry is not None
            self._reading = None
            self.pool.load([row], generation.carry)
            generation.carry = None
            self._begin([row], [generation], hidden)

    def _begin(self, rows: list[int], group: list[Generation], hidden: Tensor) -> None:
        """Draws the first token of each; its state is in its slot."""
        options = self._options(group)
        drawn = sample_tokens(self.model.logits(hidden), options)
        self._decode.set_rows(rows, drawn.tokens, options)
        self._report(drawn.to_host(), dict(enumerate(group)))
        self._running |= zip(rows, group, strict=True)
        self._count_draw(rows)

    def _options(self, group: list[Generation]) -> SamplingRows:
        samplings, drawn = [g.sampling for g in group], [g.drawn for g in group]
        return sampling_rows(samplings, drawn, self.model.config.vocab_size, self.model.device)

    def _launch(self) -> None:
        """One decode step, over the smallest batch size that holds all rows in use."""
        size = self._compact()
        self._decode.run(size)
        self._report(self._decode.on_host(), dict(self._running))
        self._count_draw(list(self._running))

    def _report(self, on_host: Drawn, owners: dict[int, Generation]) -> None:
        self._reports.append(Report(on_host, owners, self.model.device))

    def _count_draw(self, rows: list[int]) -> None:
        """Each of these rows has had a draw; after its last one it is free."""
        for row in rows:
            generation = self._running[row]
            generation.drawn += 1
            if generation.drawn == generation.sampling.max_new_tokens:
                del self._running[row]
                self.pool.release(row)

    def _compact(self) -> int:
        """Moves rows forward until the smallest batch size that can hold them does."""
        if self._one_shape:
            return self._decode.sizes[-1]
        size = next(size for size in self._decode.sizes if size >= len(self._running))
        holes = (row for row in range(size) if row not in self._running)
        for row, target in zip([row for row in self._running if row >= size], holes, strict=False):
            self.pool.move(row, target)
            self._decode.move(row, target)
            self._running[target] = self._running.pop(row)
        return size

    def _collect(self, keep: int) -> None:
        """Hands tokens that have arrived to their requests; what came after an end is dropped."""
        while len(self._reports) > keep:
            for generation, token, logprob in self._reports.pop(0).collect():
                if not generation.finished:
                    generation.accept(token, logprob)
                    if generation.finished:
                        self._vacate(generation)
