"""Short prompts in few shapes, each captured as a CUDA graph.

Launching the kernels of a read takes a host some 40 ms, however short the prompts are; a GPU
needs 5 for a few of them. So tokens are padded to one of some sizes, by a sequence of their
own that nobody reads, and sequences to one of some numbers, by sequences without tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from based.generation.pool import StatePool
from based.generation.request import Generation
from based.generation.sampling import Sampling, to_device
from based.models import Decoder
from based.ops.packed import captured_with

# Tokens, up to as many as keep a GPU busy for as long as its host.
SIZES = 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096
# Sequences: these, and as many as may be read together. Each one costs a state.
ROWS = 8, 16, 32


class PaddedPrompts:
    """Reads whole prompts into slots, of a model whose mixers allow it (`Mixer.captures_packed`).

    A shape runs as it is the first time it is needed, which compiles its kernels, and is captured
    then: the first time has the same bits as any other.
    """

    def __init__(self, model: Decoder, pool: StatePool, tokens: int, rows: int) -> None:
        self._model, self._pool, device = model, pool, model.device
        most = min(tokens, SIZES[-1])
        self._sizes = [*(size for size in SIZES if size < most), most]
        self._rows = [*(few for few in ROWS if few < rows), rows]
        # A sequence more has the padding; it stands after those in use.
        self._tokens = torch.zeros(1, most, dtype=torch.long, device=device)
        self._edges = torch.zeros(rows + 2, dtype=torch.long, device=device)
        self._slots = torch.zeros(rows + 1, dtype=torch.long, device=device)
        shape = rows, model.config.hidden_size
        self._hidden = torch.zeros(shape, dtype=model.dtype, device=device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    @staticmethod
    def reads(model: Decoder) -> bool:
        """Whether it can be made for such a model."""
        return all(mixer.captures_packed for mixer in model.mixers())

    def compile(self) -> None:
        """Reads a token, so that no request waits for the kernels of a read."""
        self.read([self._pool.slots], [Generation([0], Sampling())])

    def takes(self, group: Sequence[Generation]) -> bool:
        """Whether these are few enough tokens, of sequences that begin here."""
        total = sum(len(generation.prompt) for generation in group)
        new = all(generation.carry is None for generation in group)
        return new and total <= self._sizes[-1] and len(group) <= self._rows[-1]

    def read(self, slots: Sequence[int], group: Sequence[Generation]) -> Float[Tensor, "N C"]:
        """Loads their states into these slots; their last hidden states, until the next call."""
        tokens = [token for generation in group for token in generation.prompt]
        size = next(size for size in self._sizes if size >= len(tokens))
        rows = next(rows for rows in self._rows if rows >= len(group))
        lengths = torch.tensor([0, *(len(generation.prompt) for generation in group)])
        edges = torch.full((rows + 2,), len(tokens))
        edges[: len(lengths)], edges[-1] = lengths.cumsum(0), size
        places = torch.full((rows + 1,), self._pool.slots)
        places[: len(group)] = torch.tensor(slots)
        for held, given in (
            (self._tokens[0], torch.tensor(tokens)),
            (self._edges, edges),
            (self._slots, places),
        ):
            held[: len(given)].copy_(to_device(given, held.device))
        self._play(size, rows)
        return self._hidden[: len(group)]

    def _play(self, size: int, rows: int) -> None:
        shape = size, rows
        if shape in self._graphs:
            self._graphs[shape].replay()
            return
        self._run(size, rows)
        if self._tokens.is_cuda:
            graph = torch.cuda.CUDAGraph()
            memory = next((made.pool() for made in self._graphs.values()), None)
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._run(size, rows)
            self._graphs[shape] = graph

    @torch.no_grad()
    def _run(self, size: int, rows: int) -> None:
        edges = self._edges[: rows + 2].clone()
        with captured_with(edges):
            hidden, after = self._model.begin_packed(self._tokens[:, :size], edges)
        self._pool.load_at(self._slots[: rows + 1], after)
        # A sequence without tokens gets what stands before it.
        last = (edges[1 : rows + 1] - 1).clamp(min=0)
        self._hidden[:rows].copy_(hidden[0, last])
