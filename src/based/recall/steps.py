"""A training step of all lanes; on a GPU it is recorded once a shape and then replayed.

A step of these models is some hundred kernels of a few microseconds: launched one
by one the host would be the limit, so a whole step, optimizer included, is one
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from based.ops.stacked_cross_entropy import stacked_cross_entropy
from based.recall.lanes import Lanes
from based.recall.mqar import Segment

Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def train_step(lanes: Lanes, batch: Segment) -> None:
    """One optimizer step of every lane on the same batch."""
    hidden, head = lanes.hidden(batch.tokens, batch.positions)
    losses = stacked_cross_entropy(
        hidden.flatten(1, 2), head, batch.answers.flatten(), lanes.products
    )
    (gradient,) = torch.autograd.grad(losses.sum(), lanes.flat)
    lanes.update(gradient)
    lanes.losses += losses.detach()


class RecordedSteps:
    """`train_step`, recorded for every shape of batch that comes."""

    def __init__(self, lanes: Lanes, record: Recorder) -> None:
        self._lanes, self._record = lanes, record
        self._recorded: dict[tuple[torch.Size, torch.Size], tuple[Segment, Callable[[], None]]] = {}

    def __call__(self, lanes: Lanes, batch: Segment) -> None:
        """One step on the batch; records it first if its shape is new."""
        assert lanes is self._lanes
        shape = (batch.tokens.shape, batch.positions.shape)
        if shape not in self._recorded:
            self._recorded[shape] = self._new(batch)
        inputs, replay = self._recorded[shape]
        for own, given in zip(inputs, batch, strict=True):
            own.copy_(given)
        replay()

    def _new(self, batch: Segment) -> tuple[Segment, Callable[[], None]]:
        """Records a step; those it takes to warm up leave no trace."""
        inputs = Segment(*(tensor.clone() for tensor in batch))
        before = {name: tensor.clone() for name, tensor in self._lanes.tensors().items()}
        generator = _random_state(inputs.tokens.device)
        replay = self._record(lambda: train_step(self._lanes, inputs))
        for name, tensor in self._lanes.tensors().items():
            tensor.copy_(before[name])
        _set_random_state(inputs.tokens.device, generator)
        return inputs, replay


def stepper(lanes: Lanes) -> Callable[[Lanes, Segment], None]:
    """The fastest way to take steps where the lanes are."""
    return RecordedSteps(lanes, graph_recorder()) if lanes.flat.is_cuda else train_step


def graph_recorder() -> Recorder:
    """Records CUDA graphs that share one pool of memory: they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay

    return record


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
