"""States that grow with length: tensors `[B, tokens, ...]` in whole pages."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from based.mixers.state import State

# Tokens a page; a page at a time, so that a step seldom allocates.
PAGE = 256


def paged(tokens: int) -> int:
    """The tokens that whole pages for `tokens` tokens hold."""
    return -(-tokens // PAGE) * PAGE


def grow(state: State, names: Iterable[str], tokens: int) -> State:
    """The state with room for `tokens` tokens in the named tensors, never less than it has."""
    grown = State(state)
    for name in names:
        missing = paged(tokens) - state[name].shape[1]
        if missing > 0:
            grown[name] = F.pad(state[name], (0, 0) * (state[name].dim() - 2) + (0, missing))
    return grown


def append(state: State, new: dict[str, Tensor], longest: int) -> State:
    """A new state with `new` behind each row's own tokens; `longest` is the most a row has."""
    seen, count = state["length"], next(iter(new.values())).shape[1]
    slot = seen[:, None] + torch.arange(count, device=seen.device)
    grown = grow(state, new, longest + count)
    for name, x in new.items():
        index = slot.view(*slot.shape, *[1] * (x.dim() - 2)).expand_as(x)
        grown[name] = grown[name].scatter(1, index, x.to(grown[name].dtype))
    grown["length"] = seen + count
    return grown
