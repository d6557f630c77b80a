"""The other mixers' recurrences, and what stands around them: ours, peers', PyTorch's.

At two sizes: the recall lab's (1,024 rows of 256 tokens, float32 multiplied in TF32), and a
language model's (16 rows of 2,048 tokens, bfloat16). `based` is our kernels alone; a
peer (flash-linear-attention, mamba-ssm, causal-conv1d) runs where it is installed and
takes the dtype; `PyTorch` is the chunked form that runs without any kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from based.ops import kernels, peers
from based.ops.decayed_linear_attention import decayed_linear_attention
from based.ops.delta_rule import delta_rule, generalized_delta_rule
from based.ops.gated_norm import gated_norm
from based.ops.gated_norm.reference import gated_norm_reference
from based.ops.gated_short_convolution import shifted
from based.ops.selective_scan import selective_scan
from based.ops.short_convolution import activated_convolution
from benchmarks.timing import Case, Cells, Function, Rates, compiled, draw, rows_of


class Size(NamedTuple):
    """Rows, their tokens, and the dtype."""

    batch: int
    tokens: int
    dtype: torch.dtype


LAB, MODEL = Size(1024, 256, torch.float32), Size(16, 2048, torch.bfloat16)
# Heads, channels of keys and of values.
DECAY_A_HEAD = {LAB: ((8, 16, 64), (4, 24, 64)), MODEL: ((64, 128, 64),)}
DECAY_A_CHANNEL = {LAB: ((2, 32, 64),), MODEL: ((16, 64, 128),)}
DELTA = {LAB: ((2, 32, 32), (2, 64, 64)), MODEL: ((16, 64, 64), (16, 128, 128))}
GATED_DELTA = {LAB: ((2, 32, 64), (2, 64, 128)), MODEL: ((16, 128, 256),)}
GENERALIZED_DELTA = {LAB: ((2, 64, 64),), MODEL: ((32, 64, 64),)}
# Channels and states each.
SCAN = {LAB: ((256, 24), (512, 16)), MODEL: ((2048, 16),)}
# Heads of 64 channels.
NORM = {LAB: (8,), MODEL: (64,)}
# Channels.
CONVOLUTION = {LAB: (384, 544), MODEL: (4352,)}
HEAD_DIM, TAPS = 64, 4


@contextmanager
def only(ours: bool) -> Iterator[None]:
    """Without peers, float32 in TF32; without our kernels too unless `ours`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with ExitStack() as stack:
        stack.enter_context(patch.object(peers, "installed", lambda *_: None))
        if not ours:
            stack.enter_context(patch.object(kernels, "INSTALLED", False))
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def implementations(op: Function, peer: tuple[str, str, str] | None = None) -> dict[str, Any]:
    """The op by our kernels, by PyTorch, and by a peer (its name, module, function)."""

    def run(ours: bool) -> Function:
        def call(*inputs: Tensor) -> Any:
            with only(ours):
                return op(*inputs)

        return call

    found = {"based": run(True), "PyTorch": run(False)}
    if peer is not None and peers.installed(*peer[1:]) is not None:
        found[peer[0]] = op
    return found


def leaf(x: Tensor, size: Size) -> Tensor:
    return x.detach().to(size.dtype).requires_grad_()


def pieces(size: Size, H: int, K: int, V: int, decays: int) -> tuple[Tensor, ...]:
    """q, k of length one, v, and log decays of which 0.9 a token is about the mean."""
    q, k, v, g = (draw(*size[:2], H, n, dtype=size.dtype) for n in (K, K, V, decays))
    unit = F.normalize(k.float(), dim=-1)
    return leaf(q.float() / K**0.5, size), leaf(unit, size), v, leaf(F.logsigmoid(g + 2), size)


def recurrence_rows(
    op: str,
    run: Function,
    peer: tuple[str, str],
    size: Size,
    inputs: list[Tensor],
    rates: Rates,
    decays: int = 1,
) -> Cells:
    """Rows of an op whose first three inputs are q, k and v; delta rules read the state twice."""
    (B, T, H, K), V = inputs[0].shape, inputs[2].shape[3]
    moved, out, bits = sum(x.nbytes for x in inputs), inputs[2].nbytes, 8 * size.dtype.itemsize
    flops = (4.0 if run is decayed_linear_attention else 8.0) * B * T * H * K * V
    floors = rates.floor(moved + out, flops), rates.floor(3 * moved + 2 * out, 3 * flops)
    found = implementations(run, ("fla", *peer) if bits == 16 else None)
    case = Case(B, H, T, V)
    yield from rows_of(op, case, found, inputs, floors, key_dim=K, decays=decays, bits=bits)


def decayed(rates: Rates) -> Cells:
    """Mamba-2's, with a decay a head, and GLA's, with one a channel."""
    op, run = "decayed_linear_attention", decayed_linear_attention
    for size, H, K, V in of_sizes(DECAY_A_HEAD):
        peer, inputs = ("fla.ops.simple_gla", "chunk_simple_gla"), [*pieces(size, H, K, V, 1)]
        yield from recurrence_rows(op, run, peer, size, inputs, rates, decays=1)
    for size, H, K, V in of_sizes(DECAY_A_CHANNEL):
        peer, inputs = ("fla.ops.gla", "chunk_gla"), [*pieces(size, H, K, V, K)]
        yield from recurrence_rows(op, run, peer, size, inputs, rates, decays=K)


def deltas(rates: Rates) -> Cells:
    """DeltaNet's."""
    op, peer = "delta_rule", ("fla.ops.delta_rule", "chunk_delta_rule")
    for size, H, K, V in of_sizes(DELTA):
        q, k, v, g = pieces(size, H, K, V, 1)
        inputs = [q, k, v, leaf(torch.sigmoid(g[..., 0]), size)]
        yield from recurrence_rows(op, delta_rule, peer, size, inputs, rates)


def gated_deltas(rates: Rates) -> Cells:
    """Gated DeltaNet's."""
    op, peer = "gated_delta_rule", ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    for size, H, K, V in of_sizes(GATED_DELTA):
        q, k, v, g = pieces(size, H, K, V, 1)
        inputs = [q, k, v, leaf(torch.sigmoid(g[..., 0]), size), leaf(g[..., 0], size)]
        yield from recurrence_rows(op, delta_rule, peer, size, inputs, rates)


def generalized_deltas(rates: Rates) -> Cells:
    """RWKV-7's."""
    op, peer = "generalized_delta_rule", ("fla.ops.generalized_delta_rule", "chunk_dplr_delta_rule")
    for size, H, K, V in of_sizes(GENERALIZED_DELTA):
        q, k, v, g = pieces(size, H, K, V, K)
        inputs = [q, k, v, leaf(-k, size), leaf(k * g.exp() / 2, size), g]
        yield from recurrence_rows(op, generalized_delta_rule, peer, size, inputs, rates)


def scans(rates: Rates) -> Cells:
    """Mamba's."""
    for size, D, N in of_sizes(SCAN):
        x, b, c = (draw(*size[:2], n, dtype=size.dtype) for n in (D, N, N))
        delta = leaf(F.softplus(draw(*size[:2], D) - 3), size)
        A = leaf(-torch.arange(1.0, N + 1, device=x.device).expand(D, N), LAB)
        inputs, out = [x, delta, A, b, c], x.nbytes
        moved = sum(y.nbytes for y in inputs)
        floors = rates.floor(moved + out), rates.floor(3 * moved + 2 * out)
        peer = ("mamba-ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
        found = implementations(selective_scan, peer)
        case, bits = without_heads(size, D), 8 * x.element_size()
        yield from rows_of("selective_scan", case, found, inputs, floors, state_size=N, bits=bits)


def gated_norms(rates: Rates) -> Cells:
    """Mamba-2's skip, gate and norm."""
    for size, H in of_sizes(NORM):
        width = H * HEAD_DIM
        y, u = (draw(*size[:2], H, HEAD_DIM, dtype=size.dtype) for _ in range(2))
        sizes = (*size[:2], width), (H,), (width,)
        z, skip, weight = (draw(*shape, dtype=size.dtype) for shape in sizes)
        floors = rates.floor(4 * z.nbytes), rates.floor(11 * z.nbytes)
        found = implementations(gated_norm)
        found["torch.compile"] = compiled(gated_norm_reference)
        inputs, case = [y, u, z, skip, weight], without_heads(size, width)
        yield from rows_of("gated_norm", case, found, inputs, floors, bits=8 * z.element_size())


def convolutions(rates: Rates) -> Cells:
    """A short convolution with bias and SiLU."""
    causal = peers.installed("causal_conv1d", "causal_conv1d_fn")

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert causal is not None
        return causal(x.mT, weight, bias, activation="silu").mT

    for size, C in of_sizes(CONVOLUTION):
        x, weight, bias = (draw(*s, dtype=size.dtype) for s in ((*size[:2], C), (C, TAPS), (C,)))
        floors = rates.floor(2 * x.nbytes), rates.floor(5 * x.nbytes)
        found = implementations(activated_convolution)
        found["torch.compile"] = compiled(eager_convolution)
        found |= {"causal-conv1d": theirs} if causal is not None else {}
        inputs, case, bits = [x, weight, bias], without_heads(size, C), 8 * x.element_size()
        op = "activated_convolution"
        yield from rows_of(op, case, found, inputs, floors, taps=TAPS, bits=bits)


def eager_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(shifted.short_convolution(x, weight) + bias)


def of_sizes(shapes: dict[Size, Any]) -> Iterator[tuple[Any, ...]]:
    """Every size with each of its shapes."""
    for size, own in shapes.items():
        for shape in own:
            yield (size, *(shape if isinstance(shape, tuple) else (shape,)))


def without_heads(size: Size, channels: int) -> Case:
    return Case(size.batch, 1, size.tokens, channels)


OPS = {
    "decayed_linear_attention": decayed,
    "delta_rule": deltas,
    "gated_delta_rule": gated_deltas,
    "generalized_delta_rule": generalized_deltas,
    "selective_scan": scans,
    "gated_norm": gated_norms,
    "activated_convolution": convolutions,
}
