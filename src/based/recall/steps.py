"""A training step of all lanes; on a GPU it is recorded once a shape and then replayed.

A step of these models is some hundred kernels of a few microseconds: launched one
by one the host would be the limit, so a whole step, optimizer included, is one
CUDA graph. Most of those kernels are elementwise and bound by memory: `fused` has
torch.compile merge them first.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from based.ops.stacked_cross_entropy import stacked_cross_entropy
from based.recall.lanes import Lanes
from based.recall.mqar import Segment

Step = Callable[[], None]
Stepper = Callable[[Lanes, Segment], None]
Recorder = Callable[[Step], Step]
Fuser = Callable[[Lanes, Segment], Step]


def train_step(lanes: Lanes, batch: Segment) -> None:
    """One optimizer step of every lane on the same batch."""
    hidden, head = lanes.hidden(batch.tokens, batch.positions)
    losses = stacked_cross_entropy(
        hidden.flatten(1, 2), head, batch.answers.flatten(), lanes.products
    )
    (gradient,) = torch.autograd.grad(losses.sum(), lanes.flat)
    lanes.update(gradient)
    lanes.losses += losses.detach()


def fused(lanes: Lanes, batch: Segment, backend: str = "inductor") -> Step:
    """`train_step` on these very tensors, forward, backward and optimizer as one compiled graph.

    Traced by running it once, below vmap and autograd: what reaches the compiler
    is one flat list of operations, whatever the mixers are made of.
    """
    from torch._dynamo.backends.registry import lookup_backend
    from torch.fx.experimental.proxy_tensor import make_fx

    names, tensors = zip(*lanes.tensors().items(), strict=True)

    def step(*inputs: Tensor) -> tuple[()]:
        own = copy.copy(lanes)
        vars(own).update(zip(names, inputs, strict=False))
        own.flat = own.flat.detach().requires_grad_()
        train_step(own, Segment(*inputs[len(names) :]))
        return ()

    inputs = *tensors, *batch
    graph = make_fx(step)(*inputs)
    # Not torch.compile: Dynamo would trace the flat graph again, most of the time there.
    with torch.no_grad():
        compiled = lookup_backend(backend)(graph, list(inputs))

    def run() -> None:
        with torch.no_grad():
            compiled(*inputs)

    return run


class RecordedSteps:
    """`train_step`, recorded for every shape of batch that comes; fused first if there is a way.

    Only whole batches are worth compiling: a segment has one that is smaller.
    """

    def __init__(
        self, lanes: Lanes, record: Recorder, fuse: Fuser | None = None, batch_size: int = 0
    ) -> None:
        self._lanes, self._record, self._fuse, self._size = lanes, record, fuse, batch_size
        self._recorded: dict[tuple[torch.Size, torch.Size], tuple[Segment, Step]] = {}

    @property
    def fuses(self) -> bool:
        """Whether steps are fused: there is a way, and it has not failed."""
        return self._fuse is not None

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

    def _new(self, batch: Segment) -> tuple[Segment, Step]:
        """Records a step; those it takes to warm up leave no trace."""
        inputs = Segment(*(tensor.clone() for tensor in batch))
        before = {name: tensor.clone() for name, tensor in self._lanes.tensors().items()}
        generator = _random_state(inputs.tokens.device)
        replay = self._record(self._step(inputs))
        for name, tensor in self._lanes.tensors().items():
            tensor.copy_(before[name])
        _set_random_state(inputs.tokens.device, generator)
        return inputs, replay

    def _step(self, inputs: Segment) -> Step:
        if self._fuse is not None and len(inputs.tokens) == self._size:
            try:
                step = self._fuse(self._lanes, inputs)
                step()
                return step
            except Exception as error:
                # The compiler's failures are of many kinds, and none is the point's.
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"steps are not fused: {reason}", stacklevel=2)
                self._fuse = None
        return lambda: train_step(self._lanes, inputs)


def stepper(lanes: Lanes, fuse: bool, batch_size: int) -> Stepper:
    """The fastest way to take steps where the lanes are."""
    if not lanes.flat.is_cuda:
        return train_step
    return RecordedSteps(lanes, graph_recorder(), fused if fuse else None, batch_size)


def graph_recorder() -> Recorder:
    """Records CUDA graphs that share one pool of memory: they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Step) -> Step:
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


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
