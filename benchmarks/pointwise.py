"""What stands between a layer's matrix products, and the head's loss: eager, compiled, by hand.

Training sizes of based-1.3b and based-360m, 32,768 tokens, in bfloat16 on a float32
residual stream. Floors count every input, output and gradient moved once, and for the
head the flops of its products. Liger's kernels run if `liger_kernel` is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from based.ops.elementwise_decode import add_rms_norm_kernel, swiglu_kernel
from based.ops.gated_short_convolution import gated_short_convolution, shifted
from based.ops.linear_cross_entropy import linear_cross_entropy
from based.ops.peers import installed
from based.ops.rotary import frequencies_on, rotate
from benchmarks.timing import DEVICE, Case, Cells, Function, Rates, compiled, draw, rows_of

BATCH, TOKENS, HEADS, VOCABULARY, EPS = 16, 2048, 16, 50264, 1e-5
WIDTHS = (1792, 1024)
LIGER = "liger_kernel.transformers.functional"


def convolution(rates: Rates) -> Cells:
    """The gated short convolution of inputs and gate, the halves of one projection."""
    for width in WIDTHS:
        projected, weight = draw(BATCH, TOKENS, 4 * width), draw(2 * width, 3)
        peers: dict[str, Function] = {
            "based": lambda x, w: gated_short_convolution(x, w)[0],
            "eager": shifted.gated_short_convolution,
            "torch.compile": compiled(shifted.gated_short_convolution),
        }
        half = projected.nbytes / 2
        floors = rates.floor(3 * half), rates.floor(8 * half)
        case = Case(BATCH, 1, TOKENS, 2 * width)
        yield from rows_of("gated_short_convolution", case, peers, [projected, weight], floors)


def add_norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As a block adds a mixer's output and normalises the sum for what follows."""
    total = x + branch
    normed = F.rms_norm(total, weight.shape, weight.to(total.dtype), EPS)
    return total, normed.to(weight.dtype)


def norms(rates: Rates) -> Cells:
    """Residual addition with RMSNorm."""
    liger = installed(LIGER, "liger_rms_norm")

    def add_liger(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        assert liger is not None
        total = x + branch
        normed = liger(total, weight.to(total.dtype), EPS, in_place=False)
        return total, normed.to(weight.dtype)

    def by_hand(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, 1), branch.flatten(0, 1)
        return add_rms_norm_kernel(*rows, weight, EPS)

    for width in WIDTHS:
        x = draw(BATCH, TOKENS, width, dtype=torch.float32)
        inputs = [x, draw(BATCH, TOKENS, width), draw(width)]
        peers: dict[str, Function] = {"eager": add_norm, "torch.compile": compiled(add_norm)}
        peers |= {"based (decode)": by_hand} | ({"liger": add_liger} if liger else {})
        # float32 streams and bfloat16 branches: 4 + 2 read and 4 + 2 written an element, then
        # 2 + 4 + 4 read and 4 + 2 written.
        floors = rates.floor(12 * x.numel()), rates.floor(28 * x.numel())
        case = Case(BATCH, 1, TOKENS, width)
        yield from rows_of("add_rms_norm", case, peers, inputs, floors, ("based (decode)",))


def gate(projected: Tensor) -> Tensor:
    """SwiGLU as the model writes it."""
    value, gated = projected.chunk(2, dim=-1)
    return value * F.silu(gated)


def swiglus(rates: Rates) -> Cells:
    """SwiGLU of value and gate, the halves of one projection (for Liger, two tensors)."""
    liger = installed(LIGER, "liger_swiglu")
    for width in WIDTHS:
        projected = draw(BATCH, TOKENS, 4 * width)
        half = projected.nbytes / 2
        floors = rates.floor(3 * half), rates.floor(8 * half)
        case = Case(BATCH, 1, TOKENS, 2 * width)
        peers: dict[str, Function] = {
            "eager": gate,
            "torch.compile": compiled(gate),
            "based (decode)": lambda x: swiglu_kernel(x.flatten(0, 1)),
        }
        yield from rows_of("swiglu", case, peers, [projected], floors, ("based (decode)",))
        if liger is not None:
            inputs = [draw(BATCH, TOKENS, 2 * width) for _ in range(2)]
            yield from rows_of("swiglu", case, {"liger": liger}, inputs, floors)


def rotary(rates: Rates) -> Cells:
    """Rotary embedding of queries and keys [B, T, H, D]."""
    liger = installed(LIGER, "liger_rope")
    for width in WIDTHS:
        D = width // HEADS
        inputs = [draw(BATCH, TOKENS, HEADS, D) for _ in range(2)]
        frequencies = frequencies_on(torch.device(DEVICE), D)
        positions = torch.arange(TOKENS, device=DEVICE)[None]

        def turn(
            q: Tensor, k: Tensor, positions=positions, frequencies=frequencies
        ) -> tuple[Tensor, Tensor]:
            return rotate(q, positions, frequencies), rotate(k, positions, frequencies)

        angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

        def turn_liger(q: Tensor, k: Tensor, cos=cos, sin=sin) -> tuple[Tensor, Tensor]:
            assert liger is not None
            # Of heads before tokens, and in place.
            q, k = liger(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2)

        peers: dict[str, Function] = {"eager": turn, "torch.compile": compiled(turn)}
        peers |= {"liger": turn_liger} if liger else {}
        moved = 4 * inputs[0].nbytes
        floors = rates.floor(moved), rates.floor(2 * moved)
        yield from rows_of("rotary", Case(BATCH, HEADS, TOKENS, D), peers, inputs, floors)


def heads(rates: Rates) -> Cells:
    """The head's cross-entropy, from hidden states, weight and targets to the sum."""
    liger = installed(LIGER, "liger_fused_linear_cross_entropy")
    for width in WIDTHS:
        tokens = BATCH * TOKENS
        inputs = [draw(tokens, width), draw(VOCABULARY, width)]
        targets = torch.randint(VOCABULARY, (tokens,), device=DEVICE)

        def whole(hidden: Tensor, weight: Tensor, targets=targets) -> Tensor:
            return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")

        def chunked(hidden: Tensor, weight: Tensor, targets=targets) -> Tensor:
            return linear_cross_entropy(hidden, weight, targets)[0]

        def fused(hidden: Tensor, weight: Tensor, targets=targets) -> Tensor:
            assert liger is not None
            return liger(hidden, weight, targets, reduction="sum")

        peers: dict[str, Function] = {"based": chunked, "eager": whole}
        peers |= {"torch.compile": compiled(whole)} | ({"liger": fused} if liger else {})
        size, flops = sum(x.nbytes for x in inputs), 2.0 * tokens * width * VOCABULARY
        floors = rates.floor(size, flops), rates.floor(3 * size, 3 * flops)
        yield from rows_of(
            "linear_cross_entropy", Case(BATCH, 1, TOKENS, width), peers, inputs, floors
        )


OPS = {
    "gated_short_convolution": convolution,
    "add_rms_norm": norms,
    "swiglu": swiglus,
    "rotary": rotary,
    "linear_cross_entropy": heads,
}
