"""The engine on a GPU: graphs, kernels and bfloat16 change nothing that they may not change."""

from dataclasses import replace

import pytest
import torch
from test_engine import SAMPLED, alone, config, make, prompt, run, same_bits

from based.generation import Engine, Generation, Sampling
from based.models import Decoder, preset
from based.ops import kernels

pytestmark = pytest.mark.gpu

GREEDY = Sampling(temperature=0.0, max_new_tokens=20)


@pytest.fixture(params=["based-tiny", "attn-tiny"])
def model(request) -> Decoder:
    return make(request.param).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("slots", [3, 8])
def test_within_one_batch_size_neighbours_change_no_bit(model, slots) -> None:
    settings = config(slots=slots, deterministic=True)
    engine = Engine(model, settings)
    lengths = (5, 40, 1, 16, 17, 33, 9, 2, 20)
    requests = [engine.submit(prompt(n, n), replace(SAMPLED, seed=n)) for n in lengths]
    run(engine, *requests)
    for n, request in zip(lengths, requests, strict=True):
        assert same_bits(request, alone(model, prompt(n, n), request.sampling, settings))


def test_across_batch_sizes_log_probabilities_stay_near(model) -> None:
    engine = Engine(model, config(slots=32))
    requests = [engine.submit(prompt(9), GREEDY) for _ in range(32)]
    run(engine, *requests)
    want = alone(model, prompt(9), GREEDY, config(slots=1))
    for request in requests:
        same = [a == b for a, b in zip(request.tokens, want.tokens, strict=True)]
        count = same.index(False) if False in same else len(same)
        assert count > 0
        assert request.logprobs[:count] == pytest.approx(want.logprobs[:count], abs=0.1)


@pytest.mark.parametrize("slots", [1, 8])
def test_kernels_that_start_early_change_no_bit(model, slots, monkeypatch) -> None:
    """Programmatic launch, in graphs: a read that did not wait would see old data."""
    settings, sampling = config(slots=slots), replace(SAMPLED, max_new_tokens=100)
    early = alone(model, prompt(9), sampling, settings)
    monkeypatch.setattr("based.ops.kernels.OVERLAP", False)
    assert same_bits(alone(model, prompt(9), sampling, settings), early)


def test_what_runs_aside_changes_no_bit(monkeypatch) -> None:
    """Rings of all phases, of rows enough for folds of their own."""
    model, sampling = make("based-tiny").to("cuda", torch.bfloat16), replace(GREEDY, seed=1)
    launched = []
    real = kernels._side_stream
    monkeypatch.setattr(kernels, "_side_stream", lambda x: launched.append(x) or real(x))

    def draw() -> tuple[list[Generation], Engine]:
        engine = Engine(model, config(slots=64, deterministic=True))
        requests = [engine.submit(prompt(1 + n % 40, n), sampling) for n in range(64)]
        run(engine, *requests)
        return requests, engine

    beside, engine = draw()
    assert launched
    launched.clear()
    monkeypatch.setattr(kernels, "ASIDE", False)
    in_turn, other = draw()
    assert not launched
    for got, want in zip(beside, in_turn, strict=True):
        assert same_bits(got, want)
    for got, want in zip(engine.pool.state, other.pool.state, strict=True):
        for name in want:
            assert torch.equal(got[name], want[name])


def test_fused_projections_stay_near_what_they_fuse(model, monkeypatch) -> None:
    got = alone(model, prompt(9), GREEDY, config(slots=1))
    monkeypatch.setattr("based.ops.few_rows_linear.projections.MOST_ROWS", 0)
    want = alone(model, prompt(9), GREEDY, config(slots=1))
    same = [a == b for a, b in zip(got.tokens, want.tokens, strict=True)]
    count = same.index(False) if False in same else len(same)
    assert count > 0
    assert got.logprobs[:count] == pytest.approx(want.logprobs[:count], abs=0.1)


@pytest.mark.parametrize("precision", ["int8", "float8"])
def test_eight_bit_weights_are_read_by_our_kernels(model, precision, monkeypatch) -> None:
    """At few rows nothing is compiled, and log-probabilities are near those of whole weights."""
    pytest.importorskip("torchao")
    want = alone(model, prompt(9), GREEDY, config(slots=2))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: None)
    got = alone(model, prompt(9), GREEDY, config(slots=2, quantize=precision))
    assert got.finish_reason == "length"
    assert got.logprobs[0] == pytest.approx(want.logprobs[0], abs=0.1)


def test_slots_left_open_fit_and_memory_stays_flat(model) -> None:
    settings = config(slots=None, memory_share=2e-3, step_sizes=(8,), max_length=4096)
    engine = Engine(model, settings)
    assert engine.pool.slots > 8
    run(engine, *(engine.submit(prompt(20, i), SAMPLED) for i in range(12)))
    before = torch.cuda.memory_allocated()
    run(engine, *(engine.submit(prompt(20, i), SAMPLED) for i in range(40)))
    assert torch.cuda.memory_allocated() <= before


def test_a_float32_model_draws_what_a_cpu_draws() -> None:
    model = make()
    want = alone(model, prompt(9), SAMPLED, config())
    got = alone(model.cuda(), prompt(9), SAMPLED, config())
    assert got.tokens == want.tokens


def test_preemption_changes_no_bit(model) -> None:
    settings = config(slots=4, deterministic=True)
    want = alone(model, prompt(7), SAMPLED, settings)
    engine = Engine(model, settings)
    request = engine.submit(prompt(7), SAMPLED)
    for _ in range(6):
        engine.step()
    engine.preempt(request)
    run(engine, request, *(engine.submit(prompt(5, i), SAMPLED) for i in range(5)))
    assert same_bits(request, want)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_decode_step_never_waits_for_the_device(model) -> None:
    engine = Engine(model, config(slots=4))
    engine.submit(prompt(3), replace(SAMPLED, max_new_tokens=50))
    for _ in range(5):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_prompt_is_read_to_the_same_bits() -> None:
    """The first time it is not captured; other shapes, longer prompts among them, stand between."""
    model = make("based-tiny").to("cuda", torch.bfloat16)
    engine = Engine(model, config(slots=20, prefill_chunk=4096, prefill_rows=16))
    assert engine._padded is not None
    first = engine.submit(prompt(300), GREEDY)
    run(engine, first)
    for shape in ([37], [300, 1, 90], [700], [9] * 12, [300]):
        others = [engine.submit(prompt(n, i), GREEDY) for i, n in enumerate(shape)]
        run(engine, *others)
    assert len(engine._padded._graphs) == 5
    assert same_bits(others[0], first)
    want = alone(model, prompt(300), GREEDY, config(slots=20, prefill_chunk=64))
    assert first.logprobs[0] == pytest.approx(want.logprobs[0], abs=0.1)


@pytest.mark.filterwarnings("ignore:Taylor linear attention takes the slower")
def test_what_no_kernel_takes_is_read_as_it_is() -> None:
    """Its PyTorch form looks at the boundaries of prompts, which no capture allows."""
    torch.manual_seed(0)
    options = {"taylor_linear_attention": {"num_heads": 2, "feature_dim": 6}}
    small = replace(preset("based-tiny", vocab_size=60), mixer_options=options)
    model = Decoder(small).to("cuda", torch.bfloat16)
    engine = Engine(model, config(slots=8, prefill_rows=4))
    assert engine._padded is None
    run(engine, *(engine.submit(prompt(5 + n, n), GREEDY) for n in range(6)))
