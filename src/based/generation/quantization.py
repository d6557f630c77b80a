"""Weight-only quantisation of the projections, through torchao (the extra `quantize`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from based.errors import BasedError
from based.models import Decoder, DecoderState
from based.ops.few_rows_linear import MOST_ROWS, readable
from based.ops.kernels import use_kernels

Precision = Literal["int8", "float8"]


def quantize_weights(layers: nn.Module, precision: Precision) -> None:
    """Replaces the weights of all linear layers inside by 8-bit ones with a scale a row, in place.

    Raises `BasedError` without torchao.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise BasedError("quantised weights need torchao: pip install 'based[quantize]'") from error
    kind = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[precision]
    quantize_(layers, kind(), lambda module, name: isinstance(module, nn.Linear))


def decode_step(
    model: Decoder, precision: Precision | None
) -> Callable[[Tensor, DecoderState], Tensor]:
    """The model's step; if a precision is given, with quantised weights.

    The embedding, which is the head too, keeps its precision. On a GPU kernels of ours
    read the weights at few rows. More are compiled by torch: only so is a weight unpacked
    inside of the kernel of its product.
    """
    if precision is None:
        return model.step
    quantize_weights(model.blocks, precision)
    layers = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    read = use_kernels(model.embedding.weight) and all(map(readable, layers))
    model.compile_steps(above=MOST_ROWS if read else 0)
    return model.step
