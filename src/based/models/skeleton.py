"""A model without its weights' memory: to count what it costs, or to put saved tensors into it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from based.models.config import DecoderConfig
from based.models.decoder import Decoder

FILLS: tuple[Callable[..., Tensor], ...] = (
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_),
    *(Tensor.normal_, Tensor.uniform_),
)


class _Unfilled(TorchFunctionMode):
    """Leaves out random values: on the meta device PyTorch loads its compiler for them (1 s)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def skeleton(config: DecoderConfig) -> Decoder:
    """The model of a configuration on the meta device."""
    with torch.device("meta"), _Unfilled():
        return Decoder(config)
