"""The whole decode step, sampling included, over the first rows of a pool.

On a GPU each batch size is captured once as a CUDA graph and replayed; elsewhere
the same function runs as it is. Nothing in a step waits for the device: tokens stay
there as the next step's input, and a copy reaches the host later (`Report`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from based.errors import BasedError
from based.generation.request import Generation
from based.models import Decoder, DecoderState
from based.ops.token_sampling import Drawn, SamplingRows, sample_tokens

# Largest difference between a step's logits and the parallel form's, relative to the latter.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# Rows of each batch size that are checked.
CHECKED = 4


class DecodeStep:
    """Feeds each row's last token, draws its next one, and leaves both in place."""

    def __init__(
        self,
        model: Decoder,
        state: DecoderState,
        sizes: Sequence[int],
        step: Callable[[Tensor, DecoderState], Tensor],
        graphs: bool,
    ) -> None:
        self._model, self._step, self.sizes = model, step, sorted(sizes)
        slots, device = self.sizes[-1], model.device
        self._views = {size: state.narrow(0, size) for size in self.sizes}
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        whole = torch.zeros(slots, dtype=torch.long, device=device)
        real = torch.zeros(slots, device=device)
        self.rows = SamplingRows(real, whole, real.clone(), whole.clone(), whole.clone())
        self.report = torch.zeros(slots, 2, dtype=torch.float64, device=device)
        self._logits: dict[int, Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if graphs:
            self._capture()

    def run(self, size: int) -> Tensor:
        """One step of the first `size` rows; returns their report, overwritten by the next step."""
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self._run(size)
        return self.report[:size]

    @torch.no_grad()
    def _run(self, size: int) -> None:
        logits = self._step(self.tokens[:size], self._views[size])
        rows = self.rows.first(size)
        drawn = sample_tokens(logits, rows)
        self.tokens[:size].copy_(drawn.tokens)
        rows.position.add_(1)
        self.report[:size].copy_(packed(drawn))
        self._logits[size] = logits

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

    def set_row(self, row: int, token: Tensor, options: SamplingRows) -> None:
        """Prepares a row for its sequence: the token to feed first, and its options (one row)."""
        self.tokens[row].copy_(token)
        for own, given in zip(self.rows, options, strict=True):
            own[row].copy_(given[0])

    def move(self, source: int, target: int) -> None:
        """Copies what the step knows of a row to another."""
        for column in (self.tokens, *self.rows):
            column[target].copy_(column[source])

    @torch.no_grad()
    def check(self) -> None:
        """Two tokens at every size against the parallel form; a disagreement is an error.

        Leaves the states of all rows changed.
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
            got = self._logits[size][:CHECKED].double()
            want = self._model(tokens[:CHECKED])[0][:, -1].double()
            error = ((got - want).norm() / want.norm()).item()
            if not error <= TOLERANCE[self._model.dtype]:
                raise BasedError(
                    f"at batch size {size} the decode step differs from the model's parallel form "
                    f"by {error:.1e} of its logits: the weights are not finite, or a kernel is "
                    "wrong on this device"
                )


class Report:
    """Tokens and log-probabilities on their way to the host, and whose they are."""

    def __init__(self, values: Float[Tensor, "B 2"], owners: dict[int, Generation]) -> None:
        self._owners, self._arrived = owners, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values = values.clone()

    def collect(self) -> list[tuple[Generation, int, float]]:
        """Waits for the copy; each owner with its token and log-probability."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values = self._values.tolist()
        return [(owner, int(values[row][0]), values[row][1]) for row, owner in self._owners.items()]


def packed(drawn: Drawn) -> Float[Tensor, "B 2"]:
    """Tokens and log-probabilities as one tensor, so that one copy brings both."""
    return torch.stack([drawn.tokens.double(), drawn.logprobs.double()], dim=1)


def batch_sizes(slots: int) -> list[int]:
    """Sizes worth a graph: powers of two to 8, then steps of about an eighth to a quarter."""
    sizes, size = [], 1
    while size < slots:
        sizes.append(size)
        size += size if size < 8 else max(8, 2 ** (size.bit_length() - 3))
    return [*sizes, slots]
