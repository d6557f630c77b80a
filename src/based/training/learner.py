"""One optimiser step: gradients of this rank's sequences, clipping, AdamW.

The same on one CPU and on many GPUs; what differs is decided where the model is
built. A long sequence can be taken segment by segment, exactly: the state is all
that a segment knows of those before it, so the backward pass goes from the last
segment to the first, computing each anew from the state it began with.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from based.data.packing import document_bounds
from based.errors import BasedError
from based.mixers import State
from based.models import Decoder, DecoderConfig, DecoderState
from based.models.device import to_device
from based.models.skeleton import skeleton
from based.training.config import TrainConfig
from based.training.context_parallel import SequenceShard, split_sequences
from based.training.optimizer import build_optimizer
from based.training.parallel import Ranks


class Learner:
    """A model and its optimiser; every rank of a job has one.

    With `end_of_text`, sequences are divided into documents at that token.
    """

    def __init__(
        self,
        shape: DecoderConfig,
        config: TrainConfig,
        ranks: Ranks,
        end_of_text: int | None = None,
    ) -> None:
        self.config, self.ranks, self.end_of_text = config, ranks, end_of_text
        torch.manual_seed(config.seed)
        with ranks.device:
            self.model = Decoder(shape)
        if config.segment is not None:
            _check_segments(self.model, config)
        self.shard: SequenceShard | None = None
        if ranks.context_group is not None:
            self.shard = split_sequences(self.model, ranks.context_group)
        self.model.recompute = config.recompute
        if config.compile:
            self.model.compile_blocks()
        ranks.shard_weights(self.model, config.dtype(ranks.device))
        self.optimizer = build_optimizer(self.model, config)

    def gradients(self, rows: Int[Tensor, "B T1"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Leaves the clipped gradient of the step's mean loss; returns loss and gradient norm.

        `rows` are the sequences of this data rank. The loss is this rank's share: their
        sum over ranks is the mean over all tokens of the step. Nothing here waits for
        the device.
        """
        config = self.config
        total = torch.zeros((), device=self.ranks.device)
        parts = to_device(rows, self.ranks.device).split(config.micro_batch or len(rows))
        for number, part in enumerate(parts, start=1):
            total += self._backward(part, last=number == len(parts))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        return total, norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self, rate: float) -> None:
        """Takes the step that the gradients point to."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Weights and optimiser state, this rank's shards, for a checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def whole_model(self) -> Decoder | None:
        """The model with all weights on rank 0; None on the others, which must ask too."""
        if not isinstance(self.model, FSDPModule):
            return self.model
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = get_model_state_dict(self.model, options=options)
        if self.ranks.rank != 0:
            return None
        whole = skeleton(self.model.config)
        whole.load_state_dict(tensors, assign=True)
        return whole.to(self.ranks.device)

    def columns(self, length: int) -> slice:
        """Which of a sequence's tokens this rank has."""
        return slice(None) if self.shard is None else self.shard.columns(length)

    def _backward(self, rows: Int[Tensor, "B T1"], last: bool) -> Float[Tensor, ""]:
        """Adds the gradient of one micro-batch; returns its share of the step's mean loss."""
        tokens, targets, bounds = rows[:, :-1], rows[:, 1:], None
        if self.end_of_text is not None:
            bounds = document_bounds(tokens, self.end_of_text)
            tokens, targets = tokens.reshape(1, -1), targets.reshape(1, -1)
        own = self.columns(tokens.shape[1])
        tokens, targets = tokens[:, own], targets[:, own]
        if self.config.segment is not None:
            return self._backward_in_segments(tokens, targets, last)
        self._synchronise(last)
        loss = self.model.loss(tokens, targets, cu_seqlens=bounds)[0] / self._step_tokens
        loss.backward()
        return loss.detach()

    def _backward_in_segments(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], last: bool
    ) -> Float[Tensor, ""]:
        """Memory of one segment's activations, and a state each."""
        size = self.config.segment
        parts = list(zip(tokens.split(size, dim=1), targets.split(size, dim=1), strict=True))
        starts = [self.model.init_state(len(tokens))]
        with torch.no_grad():
            for part, following in parts[:-1]:
                starts.append(_given(self.model.loss(part, following, starts[-1])[2]))
        total, d_after = torch.zeros((), device=tokens.device), None
        for number in reversed(range(len(parts))):
            before = DecoderState(_leaves(state) for state in starts.pop())
            self._synchronise(last and number == 0)
            loss, _, after = self.model.loss(*parts[number], before)
            loss = loss / self._step_tokens
            outputs = [loss] if d_after is None else [loss, *_floats(_given(after))]
            torch.autograd.backward(outputs, None if d_after is None else [None, *d_after])
            d_after = [x.grad if x.grad is not None else x * 0 for x in _floats(before)]
            total += loss.detach()
        return total

    def _synchronise(self, last: bool) -> None:
        """Gradients are summed over ranks, and gathered weights freed, after the last backward."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            self.model.set_reshard_after_backward(last)
            self.model.set_is_last_backward(last)

    @property
    def _step_tokens(self) -> int:
        return self.config.batch_size * self.config.length


def _check_segments(model: Decoder, config: TrainConfig) -> None:
    """Refuses what a sequence taken segment by segment cannot be combined with."""
    growing = [type(mixer).__name__ for mixer in model.mixers() if not mixer.fixed_state]
    if growing:
        raise BasedError(f"segment needs states of fixed size, and {growing[0]}'s grows")
    if config.context_parallel > 1 or config.separate_documents:
        raise BasedError(
            "segment does not go with context_parallel or separate_documents; leave one out"
        )


def _leaves(state: State) -> State:
    """The same values, at which gradients are collected."""
    detached = state.detach()
    for tensor in detached.values():
        tensor.requires_grad_(tensor.is_floating_point())
    return detached


def _floats(states: DecoderState) -> list[Tensor]:
    return [x for state in states for x in state.values() if x.is_floating_point()]


def _given(state: DecoderState | None) -> DecoderState:
    assert state is not None
    return state
