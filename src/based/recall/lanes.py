"""Several models of one shape trained as one: lanes, one a learning rate.

All parameters of all lanes are one matrix `[M, P]`. A step is one graph over all
lanes (`torch.func.vmap`), and AdamW a few operations on that matrix. Lanes begin
with the same weights and share the random numbers of dropout, as runs of one
seed do, so that each computes what it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from based.ops.lanes import lanes_first
from based.ops.stacked_linear import stacked_linear
from based.recall.model import RecallModel

BETAS, EPS = (0.9, 0.999), 1e-8


class Lanes:
    """Stacked parameters, their optimizer, and the model's forms over all lanes."""

    def __init__(
        self,
        model: RecallModel,
        learning_rates: Sequence[float],
        weight_decay: float,
        products: torch.dtype | None = None,
    ) -> None:
        self.model, self.weight_decay, self.products = model, weight_decay, products
        self._names = [name for name, _ in model.named_parameters()]
        self._shapes = [parameter.shape for parameter in model.parameters()]
        with torch.no_grad():
            one = torch.cat([parameter.flatten() for parameter in model.parameters()])
        self.peaks = tuple(learning_rates)
        self.flat = one.repeat(len(self.peaks), 1).requires_grad_()
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.steps = torch.zeros((), dtype=torch.float64, device=one.device)
        self.rate = torch.tensor(self.peaks, dtype=one.dtype, device=one.device)[:, None]
        #: Sum of the losses of each lane's steps since it was last zeroed.
        self.losses = one.new_zeros(len(self.peaks))
        self.stacked = self._can_stack()

    def tensors(self) -> dict[str, Tensor]:
        """All that changes in training, by name: what a checkpoint holds."""
        return {
            "flat": self.flat.detach(),
            "mean": self.mean,
            "square": self.square,
            "steps": self.steps,
            "rate": self.rate,
            "losses": self.losses,
        }

    def keep(self, lanes: Sequence[int]) -> None:
        """Goes on with some of the lanes only."""
        index = torch.tensor(list(lanes), dtype=torch.long, device=self.flat.device)
        self.peaks = tuple(self.peaks[i] for i in lanes)
        self.flat = self.flat.detach()[index].requires_grad_()
        self.mean, self.square = self.mean[index], self.square[index]
        self.rate, self.losses = self.rate[index], self.losses[index]

    def set_rate(self, factor: float) -> None:
        """Learning rates to `factor` times their peaks."""
        peaks = torch.tensor(self.peaks, dtype=self.rate.dtype) * factor
        self.rate.copy_(peaks[:, None])

    def parameters(self) -> dict[str, Float[Tensor, "M ..."]]:
        """Views of the matrix by parameter name; gradients of all meet in one concatenation."""
        parts = self.flat.split([prod(shape) for shape in self._shapes], dim=1)
        views = (part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True))
        return dict(zip(self._names, views, strict=True))

    def hidden(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "M B D C"], Float[Tensor, "M V C"]]:
        """Hidden states at the queries of every lane, and every lane's head; differentiable."""
        parameters = self.parameters()
        head = parameters.pop("embedding.weight")
        x = self._embed(head, tokens)
        own = {name.removeprefix("body."): tensor for name, tensor in parameters.items()}

        def body(own: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.model.body, own, (x, positions))

        bf16 = self.products == torch.bfloat16
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            if self.stacked:
                with _LinearsOfLanes():
                    hidden = vmap(body, randomness="same")(own, x)
            else:
                apart = {name: tensor.unbind() for name, tensor in own.items()}
                hidden = torch.stack(
                    [
                        body({name: tensors[lane] for name, tensors in apart.items()}, x[lane])
                        for lane in range(len(self.peaks))
                    ]
                )
        return hidden.to(head.dtype), head

    def _embed(
        self, weight: Float[Tensor, "M V C"], tokens: Int[Tensor, "B T"]
    ) -> Float[Tensor, "M B T C"]:
        """Embeddings with dropout, the same random zeros in every lane."""
        x = weight.index_select(1, tokens.flatten()).unflatten(1, tokens.shape)
        share = self.model.config.embedding_dropout
        if not share:
            return x
        noise = torch.rand(x.shape[1:], device=x.device)
        return x * ((noise >= share) / (1 - share)).to(x.dtype)

    def alone(self, lane: int) -> dict[str, Tensor]:
        """The parameters of one lane, for `functional_call`."""
        return {name: tensor[lane].detach() for name, tensor in self.parameters().items()}

    @torch.no_grad()
    def update(self, gradient: Float[Tensor, "M P"]) -> None:
        """AdamW, as `torch.optim.AdamW` defines it, with a learning rate a lane."""
        first, second = BETAS
        self.steps += 1
        self.flat.mul_(1 - self.rate * self.weight_decay)
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        # On the device, so that a recorded step counts on.
        slow = (1 - second**self.steps).sqrt().to(gradient.dtype)
        step = (self.rate / (1 - first**self.steps)).to(gradient.dtype)
        self.flat.addcmul_(self.mean / (self.square.sqrt() / slow + EPS), step, value=-1)

    def _can_stack(self) -> bool:
        """Whether every op of the model has a form over lanes; else they run one by one."""
        tokens = torch.zeros(1, 8, dtype=torch.int32, device=self.flat.device)
        self.stacked = True
        try:
            hidden, _ = self.hidden(tokens, tokens[:, :1])
            torch.autograd.grad(hidden.sum(), self.flat)
        except (RuntimeError, TypeError, ValueError):
            return False
        return True


class _LinearsOfLanes(TorchFunctionMode):
    """Linear layers under vmap by `stacked_linear`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        return _Linear.apply(*_linear(*args, **(kwargs or {})))


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`F.linear`'s arguments in order."""
    return x, weight, bias


class _Linear(torch.autograd.Function):
    """Exists for its vmap rule, below which `stacked_linear` has the gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to keep."""

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[Any, ...], *args: Tensor | None
    ) -> tuple[Tensor, int]:
        lanes = info.batch_size
        x, weight, bias = (
            given if given is None else lanes_first(given, dim, lanes)
            for given, dim in zip(args, in_dims, strict=True)
        )
        assert x is not None
        assert weight is not None
        y = stacked_linear(x.reshape(lanes, -1, x.shape[-1]), weight, bias)
        return y.unflatten(1, x.shape[1:-1]), 0
