"""Where a peer's kernel runs, it is called by its own conventions, and gives what ours gives.

The kernels here are stand-ins with the peers' signatures, layouts and default scale.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from based.ops.decayed_linear_attention.reference import decayed_linear_attention_reference
from based.ops.delta_rule.reference import delta_rule_reference, generalized_delta_rule_reference
from based.ops.peers import installed, peer_kernel
from based.ops.selective_scan.reference import selective_scan_reference
from tests.ops.test_recurrences import FORMS, Form, K, attention, delta, generalized, scan


def attend(q, k, v, g, u=None, *, scale=None, initial_state=None, output_final_state=False):
    assert output_final_state
    assert k.shape == q.shape
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    return decayed_linear_attention_reference(q, k, v, g, initial_state, u)


def chunk_gla(q, k, v, g, **options):
    assert g.shape == q.shape
    return attend(q, k, v, g, **options)


def chunk_rwkv6(r, k, v, w, u, **options):
    assert w.shape == r.shape
    return attend(r, k, v, w, u, **options)


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, **options):
    return attend(q, k, v, g[..., None], **options)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, **options):
    assert options == {"output_final_state": True}
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    return delta_rule_reference(q, k, v, beta, g, initial_state)


def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, **options):
    g = torch.zeros_like(beta)
    return chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, **options)


def chunk_dplr_delta_rule(q, k, v, a, b, gk, scale=None, initial_state=None, **options):
    assert options == {"output_final_state": True}
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    return generalized_delta_rule_reference(q, k, v, a, b, gk, initial_state)


def selective_scan_fn(u, delta, A, B, C, *, return_last_state=False):
    assert return_last_state
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    y, last = selective_scan_reference(u.mT, delta.mT, A, B.mT, C.mT, state)
    return y.mT, last


def without_decay(length: int) -> tuple[Tensor | None, ...]:
    *inputs, _, state = delta(length)
    return *inputs, None, state


def without_state(length: int) -> tuple[Tensor | None, ...]:
    return *scan(length)[:-1], None


PEERS = {
    "fla.ops.simple_gla": chunk_simple_gla,
    "fla.ops.gla": chunk_gla,
    "fla.ops.rwkv6": chunk_rwkv6,
    "fla.ops.delta_rule": chunk_delta_rule,
    "fla.ops.gated_delta_rule": chunk_gated_delta_rule,
    "fla.ops.generalized_delta_rule": chunk_dplr_delta_rule,
    "mamba_ssm.ops.selective_scan_interface": selective_scan_fn,
}


@pytest.mark.parametrize(
    ("form", "make", "module"),
    [
        (FORMS["decay a head"], partial(attention, decay=1), "fla.ops.simple_gla"),
        (FORMS["decay a head"], partial(attention, decay=1, heads=1), "fla.ops.simple_gla"),
        (FORMS["decay a channel"], partial(attention, decay=K), "fla.ops.gla"),
        (FORMS["decay a channel, bonus"], partial(attention, decay=K), "fla.ops.rwkv6"),
        (FORMS["delta"], without_decay, "fla.ops.delta_rule"),
        (FORMS["delta"], delta, "fla.ops.gated_delta_rule"),
        (FORMS["generalized delta"], generalized, "fla.ops.generalized_delta_rule"),
        (FORMS["selective scan"], without_state, "mamba_ssm.ops.selective_scan_interface"),
    ],
)
def test_conventions(form: Form, make, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [None if x is None else x.float() for x in make(21)]
    want = form.op(*arguments)
    called = []

    def stand_in(name: str, function: str, x: Tensor, dtypes: tuple[torch.dtype, ...]):
        assert PEERS[name].__name__ == function
        called.append(name)
        return PEERS[name]

    op = getattr(form.op, "func", form.op)
    monkeypatch.setattr(f"{op.__module__}.peer_kernel", stand_in)
    for got, mine in zip(form.op(*arguments), want, strict=True):
        torch.testing.assert_close(got, mine, rtol=1e-4, atol=1e-5)
    assert called == [module]


def test_none_without_a_gpu_or_the_library() -> None:
    assert peer_kernel("torch", "add", torch.ones(1), (torch.float32,)) is None
    assert installed("torch", "add") is torch.add
    assert installed("torch", "no_such_kernel") is None
    assert installed("no_such_library.ops", "kernel") is None
