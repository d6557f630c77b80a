import math
from collections.abc import Iterator

import pytest
import torch

from based.data import train_tokenizer
from based.errors import BasedError
from based.generation import Engine, EngineConfig, Sampling, generate, prefill, stream, stream_text
from based.generation.sampling import sampling_rows
from based.generation.text import StopStrings
from based.models import Decoder, preset
from based.ops.token_sampling import sample_tokens

EOS = 0


@pytest.fixture(scope="module", params=["based-tiny", "attn-tiny", "window-tiny"])
def model(request) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(preset(request.param, vocab_size=60)).double()
    with torch.no_grad():
        # As drawn, a model with tied embeddings repeats its input; what the layers add must count.
        for parameter in model.blocks.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


def by_whole_sequences(model, prompt, count) -> list[int]:
    """Greedy continuation, each token from the parallel form of everything before it."""
    tokens = list(prompt)
    for _ in range(count):
        logits, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_parallel_form_token_by_token(model) -> None:
    prompt = torch.randint(1, 60, (40,)).tolist()
    greedy = Sampling(temperature=0.0, max_new_tokens=30)
    want = by_whole_sequences(model, prompt, 30)
    want = want[: want.index(EOS)] if EOS in want else want
    assert list(stream(model, prompt, greedy, EOS)) == want
    engine = Engine(model, EngineConfig(slots=1, prefill_chunk=7), eos_id=EOS)
    assert list(engine.stream(engine.submit(prompt, greedy))) == want
    assert len(set(want)) > 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_padded_batch_generates_as_each_prompt_alone(model, temperature) -> None:
    prompts = [torch.randint(1, 60, (n,)).tolist() for n in (13, 1, 30, 0)]
    sampling = Sampling(temperature=temperature, max_new_tokens=12, seed=5)
    together = generate(model, prompts, sampling, EOS)
    for row, prompt in enumerate(prompts):
        alone = Sampling(temperature=temperature, max_new_tokens=12, seed=5 + row)
        assert list(stream(model, prompt, alone, EOS)) == together[row]


def test_prefill_leaves_the_state_given_to_it_alone(model) -> None:
    tokens = torch.randint(0, 60, (2, 20))
    state = model.init_state(2)
    logits, after = prefill(model, tokens, state)
    assert all((tensor == 0).all() for layer in state for tensor in layer.values())
    torch.testing.assert_close(logits, model(tokens)[0][:, -1].detach())
    assert after.nbytes == 2 * model.state_bytes(20)


def test_memory_does_not_grow_with_what_is_generated() -> None:
    model = Decoder(preset("based-tiny", vocab_size=60))
    state = model.init_state(1)
    sizes = set()
    for _ in range(300):
        model.step(torch.tensor([1]), state)
        sizes.add(state.nbytes)
    assert sizes == {model.state_bytes(0)}


def test_sampling_draws_from_the_distribution_it_promises() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -8.0])

    def frequencies(sampling) -> torch.Tensor:
        rows = sampling_rows([sampling] * 4000, range(4000), 5, logits.device)
        drawn = sample_tokens(logits.expand(4000, -1), rows).tokens
        return torch.bincount(drawn, minlength=5) / 4000

    p = logits.softmax(-1)
    assert (frequencies(Sampling()) - p).abs().max() < 0.03
    flat = (logits / 2).softmax(-1)
    assert (frequencies(Sampling(temperature=2.0)) - flat).abs().max() < 0.03
    top = frequencies(Sampling(top_k=2))
    assert (top[2:] == 0).all()
    assert top[0] == pytest.approx((p[0] / p[:2].sum()).item(), abs=0.03)
    # 0.61 and 0.22 do not reach 0.9 together; the third token does.
    nucleus = frequencies(Sampling(top_p=0.9))
    assert (nucleus[:3] > 0).all()
    assert (nucleus[3:] == 0).all()
    assert frequencies(Sampling(top_p=1e-9))[0] == 1
    assert frequencies(Sampling(temperature=0.0))[0] == 1


def test_the_same_seed_gives_the_same_tokens(model) -> None:
    def tokens(seed):
        return list(
            stream(model, [3, 4], Sampling(temperature=3.0, seed=seed, max_new_tokens=20), EOS)
        )

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(5)}) > 1


def test_end_of_text_ends_and_is_not_part_of_it(model, monkeypatch) -> None:
    greedy = Sampling(temperature=0.0, max_new_tokens=5)
    first = next(iter(stream(model, [5, 6, 7], greedy, EOS)))
    assert list(stream(model, [5, 6, 7], greedy, first)) == []
    assert generate(model, [[5, 6, 7]], greedy, first) == [[]]
    assert generate(model, [], greedy, EOS) == []


def until_stop(pieces, stop: tuple[str, ...]) -> Iterator[str]:
    strings = StopStrings(stop)
    for piece in pieces:
        if text := strings.feed(piece):
            yield text
        if strings.found:
            return
    if text := strings.flush():
        yield text


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_strings_are_found_across_pieces(size) -> None:
    text = "one two <end> three <stop> four"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(until_stop(pieces, ("<stop>", "<end>"))) == "one two "
    assert "".join(until_stop(pieces, ("<enough>",))) == text
    assert "".join(until_stop(pieces, ())) == text


def test_text_is_streamed_as_soon_as_it_is_certain() -> None:
    emitted = []
    for piece in until_stop(iter(["ab<", "s", "x<st", "op>zz"]), ("<stop>",)):
        emitted.append(piece)
    assert emitted == ["ab", "<sx", ""] or emitted == ["ab", "<sx"]


def test_stream_text_is_the_tokens_text() -> None:
    tokenizer = train_tokenizer(["héllo wörld 🦊 " * 20], 280)
    model = Decoder(preset("based-tiny", vocab_size=tokenizer.vocab_size))
    sampling = Sampling(max_new_tokens=60, seed=3)
    ids = list(stream(model, tokenizer.encode("hé"), sampling, tokenizer.eos_id))
    raw = b"".join(map(tokenizer.token_bytes, ids))
    pieces = list(stream_text(model, tokenizer, "hé", sampling))
    assert "".join(pieces) == raw.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("",)}, "stop string is empty"),
    ],
)
def test_bad_sampling(options, says) -> None:
    with pytest.raises(BasedError, match=says):
        Sampling(**options)


def test_bad_prompts(model) -> None:
    with pytest.raises(BasedError, match=r"token id 60, but the model's vocabulary is 0 \.\. 59"):
        list(stream(model, [1, 60], Sampling(), EOS))
    with pytest.raises(BasedError, match="the prompt has no tokens"):
        prefill(model, torch.zeros(1, 0, dtype=torch.long), model.init_state(1))
