"""What goes wrong in an engine ends what it must, and nothing else; every slot is accounted for."""

import random
import weakref
from dataclasses import replace

import pytest
import torch
from test_engine import SAMPLED, alone, config, make, prompt, run, same_bits

from based.errors import BasedError
from based.generation import Engine, EngineConfig, Sampling
from based.generation.config import _fitting
from based.generation.pool import slot_bytes
from based.models import Decoder, preset


def accounted(engine: Engine) -> bool:
    """Every slot is free, decodes one sequence, or is kept for the prompt being read."""
    held = set(engine._running) | ({engine._reading[0]} if engine._reading else set())
    free = set(engine.pool._free)
    running = list(engine._running.values())
    return (
        len(engine.pool._free) == len(free)
        and not held & free
        and held | free == set(range(engine.pool.slots))
        and len(set(map(id, running))) == len(running)
        and not any(request.finished for request in running)
    )


def random_requests(engine: Engine, count: int, seed: int) -> list:
    """Requests of random sizes come at random times; some are cancelled, preempted or forked."""
    chance = random.Random(seed)
    requests, alive = [], []
    while len(requests) < count or engine.busy:
        if len(requests) < count and len(alive) < 40 and chance.random() < 0.5:
            length = chance.choice([1, 2, 3, 7, 16, 17, 40])
            sampling = Sampling(
                temperature=chance.choice([0.0, 0.7, 1.5]),
                top_k=chance.choice([None, 5]),
                top_p=chance.choice([0.8, 1.0]),
                seed=chance.randrange(1 << 40),
                max_new_tokens=chance.choice([1, 2, 5, 12, 30]),
            )
            unread = chance.choice([None, None, None, 4])
            requests.append(
                engine.submit(prompt(length, len(requests)), sampling, max_unread=unread)
            )
            alive.append(requests[-1])
        engine.step()
        assert accounted(engine)
        if alive and chance.random() < 0.2:
            victim = chance.choice(alive)
            action = chance.choice(["cancel", "preempt", "fork", "read"])
            if action == "cancel":
                engine.cancel(victim)
            elif action == "preempt":
                engine.preempt(victim)
            elif action == "read":
                victim.take()
            elif len(requests) < count and engine._row_of(victim) is not None:
                requests.append(engine.fork(victim, replace(SAMPLED, seed=len(requests))))
                alive.append(requests[-1])
            assert accounted(engine)
        alive = [request for request in alive if not request.finished]
    return requests


def check_requests(count: int, seed: int, **changes) -> None:
    model = make()
    settings = config(slots=4, recent=4, prefill_chunk=16, **changes)
    engine = Engine(model, settings, eos_id=0)
    requests = random_requests(engine, count, seed)
    assert engine.pool.free == engine.pool.slots
    assert len(requests) == count
    reasons = [request.finish_reason for request in requests]
    assert set(reasons) == {"stop", "length", "cancelled", "unread"}
    # Whatever went on around them, a sample of those that were not cut short are as if alone.
    whole = [r for r in requests if r.finish_reason in ("stop", "length") and r.tokens]
    whole = [r for r in whole if len(r.prompt) in (1, 2, 3, 7, 16, 17, 40)]
    for request in whole[:: max(1, len(whole) // 12)]:
        single = Engine(model, settings, eos_id=0)
        want = single.submit(request.prompt, request.sampling)
        run(single, want)
        assert same_bits(request, want)


def test_two_hundred_random_requests() -> None:
    check_requests(200, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("decode_per_prefill", [4, None])
def test_ten_thousand_random_requests(decode_per_prefill: int | None, record_property) -> None:
    """With a schedule that repeats itself, and with one by the clock."""
    record_property("requests", 10_000)
    check_requests(10_000, seed=2, decode_per_prefill=decode_per_prefill)


def test_logits_that_are_not_finite_end_that_request_alone() -> None:
    model = make()
    settings = config()
    want = alone(model, prompt(9), SAMPLED, settings)
    engine = Engine(model, settings)
    good, bad = engine.submit(prompt(9), SAMPLED), engine.submit(prompt(9, 4), SAMPLED)
    for _ in range(8):
        engine.step()
    row = next(row for row, request in engine._running.items() if request is bad)
    engine.pool.state[1]["numerator"][row].fill_(torch.inf)
    run(engine, good, bad)
    assert same_bits(good, want)
    assert (bad.finish_reason, bad.error) == ("error", "the model's logits are not finite")
    assert 0 < len(bad.tokens) < SAMPLED.max_new_tokens
    assert same_bits(after_all_that(engine), want)


def after_all_that(engine: Engine):
    request = engine.submit(prompt(9), SAMPLED)
    run(engine, request)
    return request


def test_a_stream_that_ends_in_an_error_says_so() -> None:
    engine = Engine(make(), config())
    request = engine.submit(prompt(5), SAMPLED)
    tokens = engine.stream(request)
    got = [next(tokens), next(tokens)]
    engine.pool.state[1]["numerator"].fill_(torch.nan)
    with pytest.raises(BasedError, match="ended early: the model's logits are not finite"):
        got.extend(tokens)
    assert got[:2] == request.tokens[:2]
    assert len(request.tokens) < SAMPLED.max_new_tokens


def test_a_prompt_too_large_for_memory_ends_alone(monkeypatch) -> None:
    """Memory runs out at seven prompts together, and for one of them even alone."""
    model = make()
    engine = Engine(model, config(slots=8, prefill_chunk=128, prefill_rows=8))
    embed = model._embed

    def limited(tokens):
        if tokens.shape[-1] > 60:
            raise torch.OutOfMemoryError("out of memory")
        return embed(tokens)

    monkeypatch.setattr(model, "_embed", limited)
    requests = [engine.submit(prompt(n, n), SAMPLED) for n in (10, 10, 70, 10, 10, 10)]
    run(engine, *requests)
    reasons = [request.finish_reason for request in requests]
    assert reasons == ["length", "length", "error", "length", "length", "length"]
    assert requests[2].error == "not enough memory to read the prompt"
    assert requests[0].tokens == requests[1].tokens == requests[5].tokens


def test_slots_that_do_not_fit_are_refused_with_what_they_need(monkeypatch) -> None:
    model = make()

    def full(*arguments) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")

    monkeypatch.setattr(model, "init_state", full)
    with pytest.raises(BasedError, match=r"100000 slots need .* GB .* ask for fewer slots"):
        Engine(model, config(slots=100_000))


def test_a_caller_that_stops_reading_loses_its_slot() -> None:
    engine = Engine(make(), config())
    reader = engine.submit(prompt(4), replace(SAMPLED, max_new_tokens=40), max_unread=5)
    idler = engine.submit(prompt(4), replace(SAMPLED, max_new_tokens=40), max_unread=5)
    got = list(engine.stream(reader))
    assert len(got) == 40
    assert (idler.finish_reason, len(idler.tokens)) == ("unread", 6)
    assert engine.pool.free == engine.pool.slots


def test_a_stream_left_early_gives_its_slot_back() -> None:
    engine = Engine(make(), config())
    request = engine.submit(prompt(4), SAMPLED)
    for count, _ in enumerate(engine.stream(request)):
        if count == 2:
            break
    assert request.finish_reason == "cancelled"
    run(engine)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_cancelled_while_waiting_reading_or_decoding(rounds) -> None:
    engine = Engine(make(), config(slots=1))
    request = engine.submit(prompt(40), SAMPLED)
    other = engine.submit(prompt(3), SAMPLED)
    for _ in range(rounds):
        engine.step()
    engine.cancel(request)
    engine.cancel(request)
    run(engine, request, other)
    assert (request.finish_reason, other.finish_reason) == ("cancelled", "length")


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 60], r"token id 60, but the model's vocabulary is 0 \.\. 59"),
        ([-1], "token id -1"),
        ([], "the prompt has no tokens"),
        ([1] * 240, "260 together; this engine's slots hold 256"),
    ],
)
def test_requests_that_cannot_be_are_refused_at_once(tokens, says) -> None:
    engine = Engine(make("attn-tiny"), config())
    with pytest.raises(BasedError, match=says):
        engine.submit(tokens, SAMPLED)
    run(engine)


def test_a_fixed_state_has_no_length_to_exceed() -> None:
    request = alone(make(), [1] * 300, SAMPLED, config())
    assert request.finish_reason == "length"


def test_a_full_queue_refuses_and_recovers() -> None:
    engine = Engine(make(), config(slots=1, max_waiting=2))
    requests = [engine.submit(prompt(3), SAMPLED) for _ in range(2)]
    with pytest.raises(BasedError, match="2 requests are waiting already"):
        engine.submit(prompt(3), SAMPLED)
    engine.step()
    requests.append(engine.submit(prompt(3), SAMPLED))
    engine.preempt(requests[0])
    run(engine, *requests)
    assert {request.finish_reason for request in requests} == {"length"}


def test_only_a_decoding_request_can_be_forked_or_kept() -> None:
    engine = Engine(make(), config())
    request = engine.submit(prompt(3), SAMPLED)
    for action in (lambda: engine.fork(request, SAMPLED), lambda: engine.snapshot(request)):
        with pytest.raises(BasedError, match="the request is not decoding"):
            action()
    engine.preempt(request)
    run(engine, request)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = Decoder(preset("based-tiny", vocab_size=60))
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(BasedError, match="the weights are not finite, or a kernel is wrong"):
        Engine(model, EngineConfig(slots=1))


def test_dials_below_one_are_refused() -> None:
    for name in ("slots", "prefill_chunk", "prefill_rows"):
        with pytest.raises(BasedError, match=f"{name} is 0; it must be at least 1"):
            Engine(make(), config(**{name: 0}))


@pytest.mark.parametrize("free", [10e9, 1e9])
def test_slots_left_open_are_what_fits_beside_the_reading_of_prompts(free, monkeypatch) -> None:
    """A GPU's memory, imitated: one call over prompts takes 2 GB of it."""
    model, most = make("attn-tiny"), [0]
    settings = EngineConfig(max_length=2000, prefill_chunk=64, prefill_rows=16, memory_share=0.5)
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: 5_000_000_000)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: most.append(0))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: 7_000_000_000)
    monkeypatch.setattr(cuda, "empty_cache", lambda: most.append(1))
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
    size, group = slot_bytes(model, 2000, 16), 16 * slot_bytes(model, 4)
    if free < 2e9:
        with pytest.raises(BasedError, match=r"beside the 2\.0 GB that reading prompts takes"):
            _fitting(model, settings)
    else:
        assert _fitting(model, settings) == int(0.5 * (free - 2e9 - group) / size)
    # The peak is looked at from the measured call on, and its memory given back.
    assert most == [0, 0, 1]


def test_the_one_by_one_reading_after_a_failed_call_has_its_memory_back(monkeypatch) -> None:
    """Nothing of the failed call's frames is alive when its prompts are read again."""
    model, alive = make(), []
    engine = Engine(model, config(slots=8, prefill_chunk=128, prefill_rows=8))
    hidden = model.hidden

    class Activations:
        pass

    def together(*_: object) -> None:
        activations = Activations()
        alive.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("out of memory")

    def one_by_one(*arguments):
        alive.append(alive[0])
        assert alive[0]() is None
        return hidden(*arguments)

    monkeypatch.setattr(model, "begin_packed", together)
    monkeypatch.setattr(model, "hidden", one_by_one)
    run(engine, *(engine.submit(prompt(5), SAMPLED) for _ in range(3)))
    assert len(alive) == 4
