"""The whole decode step, sampling included, over the first rows of a pool.

On a GPU each batch size is captured once as a CUDA graph and replayed; elsewhere
the same function runs as it is. Nothing in a step waits for the device: tokens stay
there as the next step's input, and reach the host later (`Report`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from based.errors import BasedError
from based.generation.request import Generation
from based.generation.sampling import to_device
from based.models import Decoder, DecoderState
from based.ops.token_sampling import Drawn, Outbox, SamplingRows, sample_tokens

# Largest difference between a step's logits and the parallel form's, relative to the latter.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# Rows that are checked at each end of a batch.
CHECKED = 2


class DecodeStep:
    """Feeds each row's last token, draws its next one, and leaves both in place."""

    def __init__(
        self,
        model: Decoder,
        state: DecoderState,
        sizes: Sequence[int],
        graphs: bool,
    ) -> None:
        self._model, self.sizes = model, sorted(sizes)
        slots, device = self.sizes[-1], model.device
        self._views = {size: state.narrow(0, size) for size in self.sizes}
        self.drawn = Drawn.empty(slots, device)
        self.tokens = self.drawn.tokens
        # Captured steps follow each other at once; those that are not may as well copy.
        self._outbox = Outbox(slots, device) if graphs else None
        whole = torch.zeros(slots, dtype=torch.long, device=device)
        real = torch.zeros(slots, device=device)
        self.rows = SamplingRows(real, whole, real.clone(), whole.clone(), whole.clone())
        self._logits: dict[int, Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if graphs:
            self._capture()

    def run(self, size: int) -> Drawn:
        """One step of the first `size` rows of all; what was drawn, until the next step."""
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self._run(size)
        if self._outbox is not None:
            self._outbox.count_step()
        return self.drawn

    def on_host(self) -> Drawn:
        """What the last step draws: there when the device has come so far (`Report` waits), and
        until the step after the next is launched."""
        return self.drawn.to_host() if self._outbox is None else self._outbox.last()

    @torch.no_grad()
    def _run(self, size: int) -> None:
        drawn = self.drawn.first(size)
        logits, peaks = self._model.step_with_peaks(drawn.tokens, self._views[size])
        self._logits[size] = logits
        sample_tokens(logits, self.rows.first(size), drawn, self._outbox, peaks)

    def _capture(self) -> None:
        """Captures every size, the largest first, so that all share its memory."""
        memory = None
        side = torch.cuda.Stream()
        for size in reversed(self.sizes):
            # Outside of the graph first: compiles kernels, fills caches, compiles with those.
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run(size)
                self._run(size)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                self._run(size)
            memory = memory or graph.pool()
            self._graphs[size] = graph
        if self._outbox is not None:
            self._outbox.restart()

    def set_rows(
        self, rows: Sequence[int], tokens: Int[Tensor, " N"], options: SamplingRows
    ) -> None:
        """Prepares rows for their sequences: the tokens to feed first, and their options."""
        index = to_device(torch.tensor(list(rows)), self.tokens.device)
        for own, given in zip((self.tokens, *self.rows), (tokens, *options), strict=True):
            own.index_copy_(0, index, given)

    def move(self, source: int, target: int) -> None:
        """Copies what the step knows of a row to another."""
        for column in (self.tokens, *self.rows):
            column[target].copy_(column[source])

    @torch.no_grad()
    def check(self) -> None:
        """Two tokens at every size against the parallel form; a disagreement is an error.

        The first and last rows are looked at. Leaves the states of all rows changed.
        """
        for size in self.sizes:
            for layer in self._views[size]:
                for tensor in layer.values():
                    tensor.zero_()
            count = torch.arange(2 * size, device=self.tokens.device).reshape(size, 2)
            tokens = (7 * count + 1) % self._model.config.vocab_size
            for column in tokens.unbind(1):
                self.tokens[:size].copy_(column)
                self.run(size)
            rows = sorted({*range(size)[:CHECKED], *range(size)[-CHECKED:]})
            got = self._logits[size][rows].double()
            want = self._model(tokens[rows])[0][:, -1].double()
            error = ((got - want).norm() / want.norm()).item()
            if not error <= TOLERANCE[self._model.dtype]:
                raise BasedError(
                    f"at batch size {size} the decode step differs from the model's parallel form "
                    f"by {error:.1e} of its logits: the weights are not finite, or a kernel is "
                    "wrong on this device"
                )


class Report:
    """Tokens and log-probabilities on their way to the host, and whose they are."""

    def __init__(self, on_host: Drawn, owners: dict[int, Generation], device: torch.device) -> None:
        self._drawn, self._owners, self._arrived = on_host, owners, None
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def collect(self) -> list[tuple[Generation, int, float]]:
        """Waits for the device; each owner with its token and log-probability."""
        if self._arrived is not None:
            self._arrived.synchronize()
        drawn = self._drawn.first(1 + max(self._owners, default=-1))
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        return [(owner, tokens[row], logprobs[row]) for row, owner in self._owners.items()]


def step_sizes(slots: int, wanted: Sequence[int] | None) -> list[int]:
    """The batch sizes wanted below `slots`, and that; by default those that are worth a graph:
    powers of two to 8, then steps of about an eighth to a quarter."""
    sizes, size = list(wanted or ()), 1
    while wanted is None and size < slots:
        sizes.append(size)
        size += size if size < 8 else max(8, 2 ** (size.bit_length() - 3))
    return [*sorted({size for size in sizes if size < slots}), slots]
