"""How an engine divides memory and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from based.errors import BasedError
from based.generation.padded_prompts import PaddedPrompts
from based.generation.pool import slot_bytes
from based.generation.quantization import Precision
from based.mixers.base import at_least_one
from based.models import Decoder

# Slots when their number is left open: on a CPU, and at most on a GPU.
CPU_SLOTS, MOST_SLOTS = 8, 1024


@dataclass(frozen=True)
class EngineConfig:
    """How an engine divides memory and time. None leaves a choice to the device."""

    slots: int | None = None
    """Sequences decoded at once; None: 8 on a CPU, on a GPU as many as memory holds (to 1024)."""
    step_sizes: tuple[int, ...] | None = None
    """Batch sizes that a GPU captures, the slots' number beside them; None: some thirty."""
    max_length: int = 4096
    """Tokens of a sequence, prompt included, where states grow; others are not limited."""
    prefill_chunk: int | None = None
    """Prompt tokens read in one call; None: 2,048 on a CPU, 8,192 on a GPU."""
    prefill_rows: int | None = None
    """Prompts read in one call; None: 64 on a GPU. With 1, neighbours never touch a prompt."""
    decode_per_prefill: int | None = None
    """Decode steps between two such calls, while sequences decode; None: as many as take twice as
    long as the call did, or 64."""
    max_waiting: int = 10_000
    """Requests that may queue; further ones are refused."""
    deterministic: bool = False
    """One step shape and prompts read alone: tokens never depend on what else runs."""
    recent: int = 32
    """Tokens that linear attention keeps before its state takes them up: less traffic, and less
    rounding. 0 writes the state at every token."""
    quantize: Precision | None = None
    """Weight-only quantisation of the projections, for small batches."""
    memory_share: float = 0.9
    """Share of a GPU's free memory that slots may take when their number is left open; what
    reading prompts needs is set aside before."""

    def tokens_together(self, cuda: bool) -> int:
        """Prompt tokens read in one call: fewer would leave a GPU waiting for its host."""
        return _or_usual("prefill_chunk", self.prefill_chunk, 8192 if cuda else 2048)

    def prompts_together(self, cuda: bool) -> int:
        """Prompts read in one call."""
        if self.deterministic:
            return 1
        return _or_usual("prefill_rows", self.prefill_rows, 64 if cuda else 1)


def _or_usual(name: str, given: int | None, usual: int) -> int:
    number = usual if given is None else given
    at_least_one(**{name: number})
    return number


def slot_count(model: Decoder, config: EngineConfig) -> int:
    """The number of slots asked for, or as many as the device has memory for.

    On a CPU it is rounded up to a step shape at which matrix products treat all
    rows alike, bit for bit.
    """
    cuda, slots = model.device.type == "cuda", config.slots
    if slots is None:
        slots = _fitting(model, config) if cuda else CPU_SLOTS
    at_least_one(slots=slots)
    if cuda:
        return slots
    return 1 << (slots - 1).bit_length() if slots <= 8 else -(-slots // 8) * 8


def _fitting(model: Decoder, config: EngineConfig) -> int:
    """What the device has free beside the reading of prompts, in slots.

    The rest of `memory_share` is for logits and activations of the captured steps,
    some hundred kilobytes a slot.
    """
    needed = _reading_bytes(model, config)
    torch.cuda.empty_cache()
    free = max(0, torch.cuda.mem_get_info(model.device)[0] - needed)
    size = slot_bytes(model, config.max_length, config.recent)
    fitting = int(config.memory_share * free / size)
    if fitting < 1:
        raise BasedError(
            f"a slot needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free beside the "
            f"{needed / 1e9:.1f} GB that reading prompts takes; lower max_length or prefill_chunk"
        )
    return min(fitting, MOST_SLOTS)


def _reading_bytes(model: Decoder, config: EngineConfig) -> int:
    """The most memory that a call over prompts takes: measured, and the states of its rows.

    Captured calls keep up to as much for themselves.
    """
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    length = config.tokens_together(cuda=True)
    tokens = torch.zeros(1, length, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model.hidden(tokens, model.init_state(1, config.max_length))
    rows = config.prompts_together(cuda=True)
    states = rows * slot_bytes(model, length // rows)
    needed = states + torch.cuda.max_memory_allocated(model.device) - before
    return 2 * needed if PaddedPrompts.reads(model) else needed
