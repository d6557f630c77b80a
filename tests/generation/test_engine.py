"""The engine: every request comes out as if it were alone, whatever happens around it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from based.data import train_tokenizer
from based.errors import BasedError
from based.generation import Engine, EngineConfig, Sampling, generate, stream
from based.generation.pool import StatePool, slot_bytes
from based.generation.step import step_sizes
from based.models import Decoder, preset

VOCABULARY = 60
SAMPLED = Sampling(temperature=1.5, top_k=30, top_p=0.95, max_new_tokens=20)


def make(name: str = "based-tiny", dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(preset(name, vocab_size=VOCABULARY)).to(dtype)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module", params=["based-tiny", "attn-tiny", "window-tiny"])
def model(request) -> Decoder:
    return make(request.param)


def config(**changes) -> EngineConfig:
    usual = EngineConfig(slots=4, max_length=256, prefill_chunk=16, decode_per_prefill=4)
    return replace(usual, **changes)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


def run(engine: Engine, *requests) -> None:
    for _ in range(10_000):
        if not engine.busy:
            break
        engine.step()
    assert not engine.busy
    assert engine.pool.free == engine.pool.slots
    assert all(request.finished for request in requests)


def alone(model: Decoder, tokens: list[int], sampling: Sampling, settings: EngineConfig):
    engine = Engine(model, settings)
    request = engine.submit(tokens, sampling)
    run(engine, request)
    return request


def same_bits(a, b) -> bool:
    return a.tokens == b.tokens and a.logprobs == b.logprobs


@pytest.mark.parametrize("recent", [0, 4])
def test_neighbours_change_no_bit(model, recent) -> None:
    settings = config(recent=recent)
    engine = Engine(model, settings)
    lengths = (5, 40, 1, 16, 17, 33, 9)
    requests = [
        engine.submit(prompt(n, n), replace(SAMPLED, seed=n, max_new_tokens=5 + n % 17))
        for n in lengths
    ]
    run(engine, *requests)
    for n, request in zip(lengths, requests, strict=True):
        assert same_bits(request, alone(model, prompt(n, n), request.sampling, settings))
    assert len({tuple(request.tokens[:5]) for request in requests}) > 2


def test_a_reused_slot_carries_nothing_over(model) -> None:
    """Garbage is planted in every free slot: leftovers, and NaN that would spread."""
    settings = config(recent=4)
    want = alone(model, prompt(20), SAMPLED, settings)
    engine = Engine(model, settings)
    for layer in engine.pool.state:
        for tensor in layer.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 12345)
    request = engine.submit(prompt(20), SAMPLED)
    run(engine, request)
    assert same_bits(request, want)


def test_a_slot_after_use_is_what_a_fresh_one_would_be(model) -> None:
    engine = Engine(model, config(slots=1, recent=4))
    first = engine.submit(prompt(30, 1), SAMPLED)
    run(engine, first)
    second = engine.submit(prompt(12, 2), replace(SAMPLED, max_new_tokens=60))
    for _ in range(10):
        engine.step()
    got = engine.pool.read(0)
    fresh = Engine(model, config(slots=1, recent=4))
    twin = fresh.submit(prompt(12, 2), second.sampling)
    for _ in range(10):
        fresh.step()
    assert twin.tokens == second.tokens
    for a, b in zip(got, fresh.pool.read(0), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_sequences_move_between_batch_sizes(model, monkeypatch) -> None:
    """On a GPU steps have several sizes, and rows move forward; here the same code, in float64."""
    wide = make_double(model)
    engine = Engine(wide, config(slots=8, decode_per_prefill=0))
    monkeypatch.setattr(engine, "_one_shape", False)
    engine._decode.sizes = [1, 2, 4, 8]
    engine._decode._views |= {n: engine.pool.state.narrow(0, n) for n in (1, 2, 4)}
    ran = []
    run_size = engine._decode.run
    monkeypatch.setattr(engine._decode, "run", lambda size: ran.append(size) or run_size(size))
    samplings = [replace(SAMPLED, seed=i, max_new_tokens=12 + 3 * (i % 5)) for i in range(8)]
    requests = [engine.submit(prompt(3 + i, i), s) for i, s in enumerate(samplings)]
    run(engine, *requests)
    assert set(ran) == {1, 2, 4, 8}
    for i, request in enumerate(requests):
        want = alone(wide, prompt(3 + i, i), samplings[i], config())
        assert request.tokens == want.tokens
        assert request.logprobs == pytest.approx(want.logprobs, abs=1e-9)


def test_the_sizes_that_a_gpu_captures() -> None:
    """The sizes asked for that are below the slots' number, and that number."""
    engine = Engine(make(), config(slots=8, step_sizes=(2, 16)))
    assert engine._decode.sizes == [8]  # a CPU has one
    assert step_sizes(100, (2, 64, 128)) == [2, 64, 100]
    assert step_sizes(20, None) == [1, 2, 4, 8, 16, 20]


def make_double(model: Decoder) -> Decoder:
    wide = Decoder(model.config).double()
    wide.load_state_dict(model.state_dict())
    return wide


def test_prompts_read_together_are_prompts_read_alone(model) -> None:
    wide = make_double(model)
    engine = Engine(wide, config(prefill_chunk=64, prefill_rows=8))
    lengths = (9, 9, 30, 1, 70, 5)
    requests = [engine.submit(prompt(n, i), SAMPLED) for i, n in enumerate(lengths)]
    run(engine, *requests)
    for i, n in enumerate(lengths):
        assert requests[i].tokens == alone(wide, prompt(n, i), SAMPLED, config()).tokens


def at_phases(last: int):
    """Every phase of a deferred ring of four, in the model that has one; one in the others."""
    cases = [("based-tiny", when) for when in range(2, last)]
    cases += [("attn-tiny", 4), ("window-tiny", 5)]
    return pytest.mark.parametrize(("model", "when"), cases, indirect=["model"])


@at_phases(12)
def test_preemption_changes_no_bit(model, when) -> None:
    settings = config(recent=4)
    want = alone(model, prompt(7), SAMPLED, settings)
    engine = Engine(model, settings)
    request = engine.submit(prompt(7), SAMPLED)
    for _ in range(when):
        engine.step()
    engine.preempt(request)
    assert request.parked
    others = [engine.submit(prompt(5 + i, i), SAMPLED) for i in range(5)]
    run(engine, request, *others)
    assert same_bits(request, want)


@at_phases(8)
def test_fork_and_continue_at_every_phase(model, when) -> None:
    wide = make_double(model)
    settings, greedy = config(recent=4), replace(SAMPLED, temperature=0.0, max_new_tokens=15)
    engine = Engine(wide, settings)
    request = engine.submit(prompt(7), greedy)
    for _ in range(when):
        engine.step()
    twin = engine.fork(request, replace(greedy, max_new_tokens=4))
    begun = list(request.tokens)
    kept = engine.snapshot(request)
    done = len(begun)
    assert done == when + 1
    tail = prompt(6, 9)
    longer = [engine.submit(tail, greedy, after=kept) for _ in range(2)]
    run(engine, request, twin, *longer)
    whole = alone(wide, prompt(7), greedy, config()).tokens
    assert request.tokens == whole
    assert twin.tokens == whole[done : done + 4]
    want = alone(wide, prompt(7) + whole[:done] + tail, greedy, config()).tokens
    assert [other.tokens for other in longer] == [want, want]


def test_a_snapshot_is_the_canonical_state() -> None:
    model = make(dtype=torch.float64)
    engine = Engine(model, config(recent=16))
    request = engine.submit(prompt(5), SAMPLED)
    for _ in range(7):
        engine.step()
    kept = engine.snapshot(request)
    read = [*prompt(5), *request.tokens[:-1]]
    assert kept.pending == (request.tokens[-1],)
    assert kept.length == len(read)
    _, want = model(torch.tensor([read]), model.init_state(1))
    for got, layer in zip(kept.state, want, strict=True):
        assert got.keys() == layer.keys()
        for name in layer:
            torch.testing.assert_close(got[name], layer[name], rtol=1e-9, atol=1e-9)
    # The decoding sequence is not disturbed by having been looked at.
    run(engine, request)
    assert request.tokens == alone(model, prompt(5), SAMPLED, config()).tokens


def test_the_pool_is_one_state_of_fixed_size(model) -> None:
    engine = Engine(model, config(recent=4))
    size = engine.pool.state.nbytes
    addresses = [t.data_ptr() for layer in engine.pool.state for t in layer.values()]
    assert size == 4 * slot_bytes(model, 256, 4)
    run(engine, *(engine.submit(prompt(30, i), SAMPLED) for i in range(9)))
    assert engine.pool.state.nbytes == size
    assert addresses == [t.data_ptr() for layer in engine.pool.state for t in layer.values()]


def test_first_come_first_served_and_prompts_take_a_bounded_share(monkeypatch) -> None:
    engine = Engine(make(), config(slots=4, decode_per_prefill=3))
    events = []
    step, read = engine._launch, engine._read_on
    monkeypatch.setattr(engine, "_launch", lambda: (events.append("decode"), step()))
    monkeypatch.setattr(engine, "_read_on", lambda: (events.append("read"), read()))
    requests = [engine.submit(prompt(40, i), replace(SAMPLED, max_new_tokens=30)) for i in range(7)]
    finished = []
    while engine.busy:
        engine.step()
        finished += [i for i, r in enumerate(requests) if r.finished and i not in finished]
    assert finished == list(range(7))
    first = events.index("decode")
    reads = [i for i, event in enumerate(events) if event == "read" and i > first]
    assert len(reads) > 10
    # Between two reads three decode steps, unless nothing was decoding.
    assert all(b - a == 4 for a, b in pairwise(reads))


def test_a_clock_gives_decoding_twice_what_reading_took(monkeypatch) -> None:
    """Reads of 5 s, the first of which takes 10,000, and steps of 1 s."""
    engine = Engine(make(), config(slots=4, decode_per_prefill=None))
    events, now = [], [0.0]

    def timed(name: str, seconds: float, call: Callable) -> Callable:
        def run(*arguments: object) -> object:
            now[0] += 9_995 if name == "read" and "read" not in events else 0
            events.append(name)
            now[0] += seconds
            return call(*arguments)

        return run

    monkeypatch.setattr("based.generation.engine.perf_counter", lambda: now[0])
    monkeypatch.setattr(engine, "_launch", timed("decode", 1, engine._launch))
    monkeypatch.setattr(engine, "_read_on", timed("read", 4, engine._read_on))
    long = replace(SAMPLED, max_new_tokens=200)
    run(engine, *(engine.submit(prompt(length), long) for length in (5, 40, 40)))
    reads = [i for i, event in enumerate(events) if event == "read"]
    assert reads[0] == 0
    # 64 steps at most, one of them in the round of the read; then what takes 10 s, and that one.
    assert [b - a for a, b in pairwise(reads)] == [65, *[12] * 5]


def test_a_request_is_known_one_step_after_it_was_drawn() -> None:
    engine = Engine(make(), config())
    request = engine.submit(prompt(3), SAMPLED)
    counts = []
    for _ in range(5):
        engine.step()
        counts.append((request.drawn, len(request.tokens)))
    assert counts == [(2, 1), (3, 2), (4, 3), (5, 4), (6, 5)]


def test_stop_strings_end_the_text_and_surplus_tokens_are_dropped() -> None:
    tokenizer = train_tokenizer(["abcd efgh " * 50], 270)
    torch.manual_seed(0)
    model = Decoder(preset("based-tiny", vocab_size=tokenizer.vocab_size))
    engine = Engine(model, config(), tokenizer=tokenizer)
    sampling = Sampling(temperature=3.0, max_new_tokens=60, seed=1)
    free = "".join(engine.stream_text(engine.submit(tokenizer.encode("ab"), sampling)))
    stop = free[20:22]
    request = engine.submit(tokenizer.encode("ab"), replace(sampling, stop=(stop,)))
    assert "".join(engine.stream_text(request)) == free[: free.index(stop)]
    assert request.finish_reason == "stop"
    assert request.drawn > len(request.tokens)
    assert engine.pool.free == engine.pool.slots
    with pytest.raises(BasedError, match="stop strings need the engine to have"):
        Engine(model, config()).submit([1], replace(sampling, stop=("x",)))


def test_log_probabilities_are_the_model_s(model) -> None:
    request = alone(make_double(model), prompt(8), SAMPLED, config())
    tokens = [*prompt(8), *request.tokens]
    logits, _ = make_double(model)(torch.tensor([tokens]))
    want = logits[0].log_softmax(-1)[7:-1].gather(1, torch.tensor(request.tokens)[:, None])
    torch.testing.assert_close(torch.tensor(request.logprobs).double(), want[:, 0].detach())


def test_one_call_generation_is_the_engine(model) -> None:
    wide = make_double(model)
    prompts = [prompt(4, 1), prompt(11, 2)]
    got = generate(wide, prompts, SAMPLED, eos_id=0)
    for row, tokens in enumerate(prompts):
        sampling = replace(SAMPLED, seed=SAMPLED.seed + row)
        assert list(stream(wide, tokens, sampling, eos_id=0)) == got[row]


def test_a_wrong_decode_step_is_refused_at_the_start(monkeypatch) -> None:
    model = make()
    step = type(model).step_with_peaks
    wrong = lambda self, t, s: (1.01 * step(self, t, s)[0], None)  # noqa: E731
    monkeypatch.setattr(type(model), "step_with_peaks", wrong)
    with pytest.raises(BasedError, match="the decode step differs from the model's parallel form"):
        Engine(model, config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_leave_and_enter_a_pool_whole(dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    pool = StatePool(model, 3, 0, 4)
    with torch.no_grad():
        _, state = model(torch.tensor([prompt(9), prompt(9, 1)]), model.init_state(2))
    assert [pool.acquire(), pool.acquire()] == [0, 1]
    pool.load([1, 0], state)
    pool.move(1, 2)
    assert pool.free == 1
    assert pool.acquire() == 1
    for row, index in ((0, 1), (2, 0)):
        for layer, given in zip(pool.canonical(row), state, strict=True):
            assert layer.keys() == given.keys()
            assert all(torch.equal(layer[name][0], given[name][index]) for name in given)
