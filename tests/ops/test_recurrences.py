"""Decayed linear attention, delta rules and the selective scan: every form is the reference."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from based.ops.decayed_linear_attention import (
    decayed_linear_attention,
    decayed_linear_attention_step,
)
from based.ops.decayed_linear_attention.reference import decayed_linear_attention_reference
from based.ops.delta_rule import (
    delta_rule,
    delta_rule_step,
    generalized_delta_rule,
    generalized_delta_rule_step,
)
from based.ops.delta_rule.reference import delta_rule_reference, generalized_delta_rule_reference
from based.ops.selective_scan import selective_scan, selective_scan_step
from based.ops.selective_scan.reference import selective_scan_reference

B, H, K, V = 2, 3, 5, 4
LENGTHS = (1, 2, 17, 64, 150)
randn = partial(torch.randn, dtype=torch.float64)


def attention(length: int, decay: int, heads: int = H) -> tuple[Tensor, ...]:
    q, k = randn(B, length, heads, K), randn(B, length, heads, K)
    return q, k, randn(B, length, H, V), F.logsigmoid(randn(B, length, H, decay)), randn(B, H, K, V)


def delta(length: int) -> tuple[Tensor, ...]:
    q, k, v, g, state = attention(length, 1)
    k = F.normalize(k, dim=-1)
    return q, k, v, 2 * torch.rand(B, length, H, dtype=torch.float64), g[..., 0], state


def generalized(length: int) -> tuple[Tensor, ...]:
    q, k, v, g, state = attention(length, K)
    a, rate = F.normalize(randn(B, length, H, K), dim=-1), torch.rand_like(k)
    return q, k, v, -a, a * rate, g, state


def scan(length: int) -> tuple[Tensor, ...]:
    x, step = randn(B, length, H), F.softplus(randn(B, length, H))
    b, c = randn(B, length, K), randn(B, length, K)
    return x, step, -randn(H, K).exp(), b, c, randn(B, H, K)


class Form:
    """An op's three forms, and random arguments; the last argument is always the state."""

    def __init__(self, op: Callable, step: Callable, reference: Callable, make: Callable) -> None:
        self.op, self.step, self.reference, self.make = op, step, reference, make


decayed = (
    decayed_linear_attention,
    decayed_linear_attention_step,
    decayed_linear_attention_reference,
)
bonus = torch.linspace(-1, 1, H * K, dtype=torch.float64).view(H, K)
FORMS = {
    "decay a head": Form(*decayed, partial(attention, decay=1)),
    "decay a head, shared keys": Form(*decayed, partial(attention, decay=1, heads=1)),
    "decay a channel": Form(*decayed, partial(attention, decay=K)),
    "decay a channel, bonus": Form(
        *(partial(form, bonus=bonus) for form in decayed), partial(attention, decay=K)
    ),
    "delta": Form(delta_rule, delta_rule_step, delta_rule_reference, delta),
    "generalized delta": Form(
        generalized_delta_rule,
        generalized_delta_rule_step,
        generalized_delta_rule_reference,
        generalized,
    ),
    "selective scan": Form(selective_scan, selective_scan_step, selective_scan_reference, scan),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    elements = {"cpu": 40 * B * H * K}
    monkeypatch.setattr("based.ops.selective_scan.chunked.SPAN_ELEMENTS", elements)


def assert_same(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"differs by {error:.2e}"


@every_form
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_chunks_are_the_reference(form: Form, length: int, dtype, tolerance: float) -> None:
    arguments = form.make(length)
    want, final = form.reference(*arguments)
    got, state = form.op(*(x.to(dtype) for x in arguments))
    assert got.dtype == state.dtype == dtype
    assert_same(got, want, tolerance)
    assert_same(state, final, tolerance)


def outputs_and_gradients(
    op: Callable, arguments: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Output, final state, and what a weighted sum of both has as gradients."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    outputs = op(*(x.to(dtype) for x in leaves))
    weights = [torch.arange(y.shape[-2:].numel()).cos().view(y.shape[-2:]) for y in outputs]
    loss = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


@every_form
def test_gradients_are_the_references(form: Form) -> None:
    arguments = form.make(83)
    want = outputs_and_gradients(form.reference, arguments, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        got = outputs_and_gradients(form.op, arguments, dtype)
        for mine, theirs in zip(got, want, strict=True):
            assert_same(mine, theirs, tolerance)


@every_form
def test_one_step_is_one_token(form: Form) -> None:
    *inputs, state = form.make(1)
    shared = {i for i, x in enumerate(inputs) if x.dim() == 2}
    want, final = form.reference(*inputs, state)
    got = form.step(*(x if i in shared else x[:, 0] for i, x in enumerate(inputs)), state)
    assert_same(got, want[:, 0], 1e-12)
    assert_same(state, final, 1e-12)


@every_form
def test_no_tokens_leave_the_state(form: Form) -> None:
    *inputs, state = form.make(1)
    out, after = form.op(*(x if x.dim() == 2 else x[:, :0] for x in inputs), state)
    assert out.shape[1] == 0
    assert_same(after, state, 0.0)


@every_form
def test_strong_decays_neither_overflow_nor_lose_precision(form: Form) -> None:
    arguments = list(form.make(150))
    index = {delta: 4, generalized: 5, scan: 1}.get(form.make, 3)
    decay = arguments[index]
    # Most tokens keep the state; a few erase it, or some of its channels.
    arguments[index] = torch.where(torch.rand_like(decay) < 0.1, 1000 * decay, 1e-3 * decay)
    want = outputs_and_gradients(form.reference, arguments, torch.float64)
    got = outputs_and_gradients(form.op, arguments, torch.float32)
    for mine, theirs in zip(got, want, strict=True):
        assert_same(mine, theirs, 1e-5)


@every_form
def test_models_side_by_side(form: Form) -> None:
    lanes = [form.make(70) for _ in range(3)]
    stacked = [torch.stack(x) for x in zip(*lanes, strict=True)]
    got = outputs_and_gradients(torch.func.vmap(form.op), stacked, torch.float64)
    apart = [outputs_and_gradients(form.op, arguments, torch.float64) for arguments in lanes]
    for mine, theirs in zip(got, zip(*apart, strict=True), strict=True):
        assert_same(mine, torch.stack(theirs), 1e-12)


def test_states_of_a_long_scan_are_not_kept() -> None:
    x, step, A, b, c, state = scan(400)
    leaves = [y.float().requires_grad_() for y in (x, step, A, b, c, state)]
    kept: list[int] = []

    def pack(y: Tensor) -> Tensor:
        kept.append(y.untyped_storage().nbytes())
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        selective_scan(*leaves)
    assert max(kept) < 400 * B * H * K * 4
