"""Weight-only quantisation of the projections, through torchao (the extra `quantize`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from based.errors import BasedError
from based.models import Decoder
from based.ops.few_rows_linear import MOST_ROWS, readable

Precision = Literal["int8", "float8"]


def quantize_weights(layers: nn.Module, precision: Precision) -> None:
    """Replaces the weights of all linear layers inside by 8-bit ones with a scale a row, in place.

    Raises `BasedError` without torchao.
    """
    try:
        with _quiet("torchao", "torch.utils._pytree"):
            from torchao.quantization import (
                Float8WeightOnlyConfig,
                Int8WeightOnlyConfig,
                quantize_,
            )
    except ImportError as error:
        raise BasedError("quantised weights need torchao: pip install 'based[quantize]'") from error
    kind = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[precision]
    quantize_(layers, kind(), lambda module, name: isinstance(module, nn.Linear))


def quantize_step(model: Decoder, precision: Precision) -> None:
    """Quantises the blocks' weights, and readies the model's step for them.

    The embedding, which is the head too, keeps its precision. On a GPU kernels of ours
    read the weights at few rows. More are compiled by torch: only so is a weight unpacked
    inside of the kernel of its product. On a CPU few rows are not worth compiling for.
    """
    quantize_weights(model.blocks, precision)
    layers = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    few = model.device.type == "cpu" or all(map(readable, layers))
    model.compile_steps(above=MOST_ROWS if few else 0)


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Without warnings of an import, of binary parts that are not used here."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
