"""The cache of a generation: the decoder's state, whatever its mixers are."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from based.errors import BasedError
from based.models.decoder import DecoderState


class BasedCache(Cache):
    """Holds a `DecoderState` and how many tokens a row has been fed, padding included.

    Empty until the model's first call. A model of fixed-state mixers keeps it at one
    size, so that a decoding step can be compiled (`static`).
    """

    def __init__(self, static: bool = False) -> None:
        super().__init__(layers=[])
        self.state: DecoderState | None = None
        self.seen = torch.zeros((), dtype=torch.long)
        self.static = static

    def advance(self, state: DecoderState, tokens: Tensor) -> None:
        """Puts the state after `tokens` [B, T] in place of the one before them."""
        self.state = state
        # A tensor, counted in place: a compiled step must not depend on its value.
        self.seen = self.seen.to(tokens.device).add_(tokens.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.state is None else self.state.nbytes

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first call."""
        return -1 if self.state is None else self.state[0].batch_size

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the decoding step."""
        return self.static

    @property
    def is_croppable(self) -> bool:
        """A recurrent state cannot forget its last tokens."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether there is a state yet."""
        return self.state is not None

    @property
    def is_linear(self) -> list[bool]:
        """Of no layer: `generate` then counts the tokens fed and passes only the new ones."""
        return [False] * len(self)

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens a row has been fed, padding included."""
        return int(self.seen)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.seen = None, torch.zeros_like(self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the rows `beam_idx`, in that order."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`, in that order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        rows = torch.arange(self.batch_size, device=self.seen.device)
        self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to forget tokens."""
        if tokens_to_remove != 0:
            raise BasedError("a recurrent state cannot forget its last tokens; start a new cache")
