"""Weight-only quantisation of the projections, through torchao (the extra `quantize`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from based.errors import BasedError
from based.models import Decoder, DecoderState

Precision = Literal["int8", "float8"]


def quantize_weights(model: Decoder, precision: Precision) -> None:
    """Replaces the linear layers' weights by 8-bit ones with a scale a row, in place.

    The embedding, which is the head too, keeps its precision. Raises `BasedError`
    without torchao.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise BasedError("quantised weights need torchao: pip install 'based[quantize]'") from error
    kind = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[precision]
    quantize_(model.blocks, kind(), lambda module, name: isinstance(module, nn.Linear))


def decode_step(
    model: Decoder, precision: Precision | None
) -> Callable[[Tensor, DecoderState], Tensor]:
    """The model's step; if a precision is given, with quantised weights and compiled blocks.

    Only compiled is a weight unpacked inside of the kernel of its product. Blocks of one
    kind share what is compiled.
    """
    if precision is None:
        return model.step
    quantize_weights(model, precision)
    model.compile_steps()
    return model.step
