"""Prompts in few shapes: the same as packed prompts of any length, and nothing left over."""

import pytest
import torch
from test_engine import SAMPLED, config, make, prompt, run
from torch import Tensor

from based.generation import Engine, EngineConfig, Generation
from based.generation import engine as engine_module
from based.generation.padded_prompts import PaddedPrompts
from based.generation.pool import StatePool
from based.generation.prefill import prefill
from based.mixers import State
from based.models import Decoder, DecoderState, preset
from based.models.presets import PRESETS
from based.ops import packed
from based.ops.gated_short_convolution import operator as convolution_operator
from based.ops.gated_short_convolution import triton as convolution_kernels
from based.ops.sliding_window_attention import operator as window_operator
from based.ops.sliding_window_attention.kernels import launch as window_launch
from based.ops.taylor_linear_attention import operator as taylor_operator
from based.ops.taylor_linear_attention.kernels import launch as taylor_launch


def group(*lengths: int) -> list[Generation]:
    return [Generation(prompt(n, seed), SAMPLED) for seed, n in enumerate(lengths)]


def alone(model: Decoder, prompts: list[Generation]) -> tuple[Tensor, DecoderState]:
    """Each prompt by itself: next-token logits, and a row of the state for each."""
    read = [prefill(model, torch.tensor([x.prompt]), model.init_state(1)) for x in prompts]
    layers = zip(*(state for _, state in read), strict=True)
    return torch.cat([logits for logits, _ in read]), DecoderState(
        State.concatenate(rows) for rows in layers
    )


@pytest.mark.parametrize("name", ["based-tiny", "window-tiny"])
def test_prompts_are_read_as_if_they_were_not_padded(name: str) -> None:
    """One, many, short after long ones, and as many tokens and rows as there may be."""
    model = make(name, torch.float64)
    pool = StatePool(model, 20, 0, spare=True)
    reader = PaddedPrompts(model, pool, tokens=500, rows=20)
    for lengths in ([300, 200], [5], [130], [1] * 20, [7, 1, 90], [128]):
        prompts = group(*lengths)
        assert reader.takes(prompts)
        slots = torch.randperm(20)[: len(prompts)].tolist()
        before = pool.state.clone()
        hidden = reader.read(slots, prompts)
        want, want_state = alone(model, prompts)
        torch.testing.assert_close(model.logits(hidden), want, atol=1e-9, rtol=0)
        others = [slot for slot in range(20) if slot not in slots]
        for got, layer, old in zip(pool.state, want_state, before, strict=True):
            assert got.keys() == layer.keys()
            for key in layer:
                torch.testing.assert_close(got[key][slots], layer[key], atol=1e-9, rtol=0)
                assert torch.equal(got[key][others], old[key][others])


def test_what_it_does_not_take() -> None:
    model = make()
    reader = PaddedPrompts(model, StatePool(model, 3, 0, spare=True), tokens=100, rows=3)
    assert reader.takes(group(50, 49, 1))
    assert not reader.takes(group(50, 50, 1))
    assert not reader.takes(group(1, 1, 1, 1))
    (continued,) = group(5)
    continued.carry = model.init_state(1)
    assert not reader.takes([continued])
    assert not PaddedPrompts.reads(make("attn-tiny"))


def test_the_engine_s_requests_come_out_the_same() -> None:
    """Alone and together, longer than a chunk, and those that go on from a snapshot."""
    model, settings = make(dtype=torch.float64), config(prefill_rows=4)
    lengths = 3, 16, 15, 1, 40, 9, 5, 17, 2

    def requests(padded: bool) -> list[Generation]:
        engine = Engine(model, settings)
        if padded:
            pool = StatePool(model, 4, 256, settings.recent, spare=True)
            # The engine's slots are the pool's first rows.
            engine.pool, engine._decode._views = pool, {4: pool.state.narrow(0, 4)}
            engine._padded = PaddedPrompts(model, pool, tokens=16, rows=4)
        first = engine.submit(prompt(6), SAMPLED)
        for _ in range(4):
            engine.step()
        kept = engine.snapshot(first)
        made = [engine.submit(prompt(n, n), SAMPLED) for n in lengths]
        made += [first, engine.submit(prompt(4), SAMPLED, after=kept)]
        run(engine, *made)
        return made

    for got, want in zip(requests(True), requests(False), strict=True):
        assert got.tokens == want.tokens
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-9)


def test_compiling_changes_no_slot(monkeypatch) -> None:
    """On a GPU an engine begins with it."""
    model = make()
    engine = Engine(model, config(prefill_rows=4))
    pool = StatePool(model, 4, 256, config().recent, spare=True)
    monkeypatch.setattr(engine, "_padded", PaddedPrompts(model, pool, tokens=16, rows=4))
    drawn = []
    draw = engine_module.sample_tokens

    def counted(logits, options):
        drawn.append(len(logits))
        return draw(logits, options)

    monkeypatch.setattr(engine_module, "sample_tokens", counted)
    engine._compile(4)
    assert sorted(drawn) == [1, 4]
    assert not any(tensor[:4].any() for layer in pool.state for tensor in layer.values())
    assert pool.state[1]["numerator"][4].any()


def test_out_of_memory_gives_captured_shapes_up(monkeypatch) -> None:
    model = make()
    engine = Engine(model, config(prefill_rows=4))
    reader = PaddedPrompts(model, engine.pool, tokens=16, rows=4)
    monkeypatch.setattr(engine, "_padded", reader)

    def read(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(reader, "read", read)
    requests = [engine.submit(prompt(n, n), SAMPLED) for n in (3, 5)]
    run(engine, *requests)
    assert engine._padded is None
    assert [request.finish_reason for request in requests] == ["length", "length"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("based")])
def test_no_read_looks_at_data(name: str, launches, monkeypatch) -> None:
    """A read that waits for the device, or copies from the host, cannot be captured."""

    def taylor(*arguments):
        *results, states = taylor_launch.forward(*arguments)
        return *results, *states

    # Operators would show their shapes alone.
    monkeypatch.setattr(taylor_operator, "_takes_kernels", lambda q, v: True)
    monkeypatch.setattr(taylor_operator, "_forward", taylor)
    monkeypatch.setattr(window_operator, "_forward", window_launch.forward)
    monkeypatch.setattr(convolution_operator, "_forward", convolution_kernels.forward)
    with torch.device("meta"):
        model = Decoder(preset(name)).bfloat16()
    assert PaddedPrompts.reads(model)
    pool = StatePool(model, 128, 0, EngineConfig.recent, spare=True)
    reader = PaddedPrompts(model, pool, tokens=4096, rows=64)
    reader._run(256, 8)  # fills caches, as the run before a capture does
    launches.nodes.clear()
    with launches:
        reader._run(256, 8)
    for kernel in ("sum_states", "attend", "window_outputs", "convolution_forward"):
        assert launches.nodes[kernel] > 0


def test_tables_of_a_capture_are_made_once(monkeypatch) -> None:
    """And without a word of it anew for each layer: they would be of another capture."""
    monkeypatch.setattr(packed, "_stays", lambda cu_seqlens: False)
    edges = torch.tensor([0, 3, 7])
    assert packed.positions(edges, 7) is not packed.positions(edges, 7)
    with packed.captured_with(edges):
        made = packed.positions(edges, 7)
        assert packed.positions(edges, 7) is made
        other = edges.clone()
        assert packed.positions(other, 7) is not packed.positions(other, 7)
    assert packed.positions(edges, 7) is not made
