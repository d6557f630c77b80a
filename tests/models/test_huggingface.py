"""The Hugging Face model: its numbers are the decoder's, its files are ours."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jaxtyping
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
)

from based.data import train_tokenizer
from based.errors import BasedError
from based.mixers import MIXERS
from based.models import Decoder, DecoderConfig, load_model, save_model
from based.models.checkpoint import AUTO, HUB_CODE, read_config
from based.models.huggingface import BasedCache, BasedConfig, BasedForCausalLM
from based.models.huggingface.modeling import CACHE
from tests.mixers.test_every_mixer import SIZE, every_mixer

FIXED = ("gated_convolution", "taylor_linear_attention", "sliding_window_attention")
OPTIONS = {
    "taylor_linear_attention": {"num_heads": 2, "feature_dim": 4},
    "sliding_window_attention": {"num_heads": 2, "window": 5},
    "softmax_attention": {"num_heads": 2},
}
VOCABULARY = 60


def config(*mixers: str) -> DecoderConfig:
    return DecoderConfig(VOCABULARY, 32, 48, mixers or (*FIXED, "softmax_attention"), OPTIONS)


def randomize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)


def build(*mixers: str, dtype: torch.dtype = torch.float64) -> BasedForCausalLM:
    hub = BasedConfig.of(config(*mixers), eos_token_id=0, pad_token_id=0)
    model = BasedForCausalLM(hub).to(dtype).eval()
    randomize(model)
    return model


def prompts(rows: int = 2, tokens: int = 11) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, tokens))


def greedy(model: BasedForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Token by token from the whole text, without any cache."""
    for _ in range(count):
        logits, _ = Decoder.forward(model.model, ids)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


def generate(model: BasedForCausalLM, ids: torch.Tensor, count: int = 5, **options):
    options = {"do_sample": False, "eos_token_id": None, **options}
    return model.generate(ids, max_new_tokens=count, **options)


# The interface


def test_logits_loss_and_cache_are_the_decoders() -> None:
    model, ids = build(), prompts()
    want, _ = Decoder.forward(model.model, ids)
    torch.testing.assert_close(model(ids, use_cache=False).logits, want, rtol=0, atol=0)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits, want, rtol=1e-12, atol=1e-12)
    loss = torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-6)
    cache = out[CACHE]
    assert cache.nbytes == 2 * model.model.state_bytes(11)
    assert set(vars(cache)) >= {"state"}
    more = prompts(2, 3)
    after = model(more, **{CACHE: cache}).logits
    whole, _ = Decoder.forward(model.model, torch.cat([ids, more], 1))
    torch.testing.assert_close(after, whole[:, 11:], rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 14
    assert model(ids, use_cache=False).keys() == {"logits"}
    assert len(model(ids, return_dict=False)) == 2


def test_ignored_labels_do_not_count() -> None:
    model, ids = build(), prompts()
    labels = ids.clone()
    labels[:, :5] = -100
    logits = model(ids).logits
    want = torch.nn.functional.cross_entropy(logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten())
    got = model(ids, labels=labels).loss
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_logits_to_keep() -> None:
    model, ids = build(), prompts()
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    some = torch.tensor([1, 4, 7])
    torch.testing.assert_close(model(ids, logits_to_keep=some).logits, whole[:, some])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_no_trace(side: str) -> None:
    model, ids, lengths = build(), prompts(3, 9), [4, 9, 1]
    slot = torch.arange(9)
    mask = torch.stack([slot >= 9 - n if side == "left" else slot < n for n in lengths])
    out = model(ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100))
    for row in range(3):
        alone = model(ids[row : row + 1, mask[row]]).logits
        torch.testing.assert_close(out.logits[row, mask[row]], alone[0], rtol=1e-9, atol=1e-9)


def test_positions_that_begin_again_separate_packed_documents() -> None:
    model, ids = build(), prompts(2, 10)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6], [4, 5, 0, 1, 2, 3, 4, 5, 6, 0]])
    got = model(ids, position_ids=positions, use_cache=False).logits
    for row, edges in ((0, (0, 3, 10)), (1, (0, 2, 9, 10))):
        for start, end in pairwise(edges):
            alone = model(ids[row : row + 1, start:end]).logits[0]
            torch.testing.assert_close(got[row, start:end], alone, rtol=1e-9, atol=1e-9)
    plain = torch.arange(10).expand(2, 10)
    whole = model(ids, position_ids=plain, use_cache=False).logits
    torch.testing.assert_close(whole, model(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model, ids = build().train(), prompts()
    calls = []
    model.model.blocks[0].mixer_norm.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        calls.clear()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    assert len(calls) == 1
    # Transformers 5.17 has but the older name.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    got = gradients()
    assert len(calls) == 2
    torch.testing.assert_close(got, want)
    disable = getattr(
        model, "activation_checkpointing_disable", model.gradient_checkpointing_disable
    )
    disable()
    gradients()
    assert len(calls) == 1


def test_config_is_derived_from_mixers_alone() -> None:
    hub = BasedConfig.of(config())
    assert hub.layer_types == [*["linear_attention"] * 2, "sliding_attention", "full_attention"]
    assert hub.num_hidden_layers == 4
    assert len(DynamicCache(config=hub.__class__.of(config(*FIXED[:2])))) == 2
    assert hub.decoder_config().to_dict() == config().to_dict()
    assert BasedConfig().decoder_config().mixers.count("taylor_linear_attention") == 5
    for name in MIXERS:
        assert BasedConfig(mixers=[name], mixer_options={}).layer_types


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: BasedConfig(mixers=[]), "mixers is empty"),
        (lambda m: BasedConfig(tie_word_embeddings=False), "the output layer is the embedding"),
        (lambda m: m(prompts(), output_hidden_states=True), "output_hidden_states is not"),
        (lambda m: m(prompts(), inputs_embeds=torch.ones(2, 11, 32)), "inputs_embeds is not"),
        (lambda m: m(prompts(), attention_mask=torch.ones(2, 1, 9, 9)), "attention_mask must be"),
        (lambda m: m(prompts(3), **{CACHE: m(prompts(2))[CACHE]}), "the cache is of 2 sequences"),
        (lambda m: m(prompts(), **{CACHE: DynamicCache()}), "DynamicCache cannot hold"),
        (lambda m: m(prompts())[CACHE].crop(-1), "cannot forget"),
        (lambda m: generate(m, prompts(), cache_implementation="static"), "grows with length"),
        (lambda m: generate(m, prompts(), cache_implementation="offloaded"), "leave it out"),
    ],
)
def test_what_cannot_be_is_one_line(call, message: str) -> None:
    with pytest.raises(BasedError, match=message) as raised:
        call(build())
    assert "\n" not in str(raised.value)


# Generation


@every_mixer
def test_generate_is_the_whole_text_again_for_every_mixer(name, options) -> None:
    shape = DecoderConfig(VOCABULARY, SIZE, 32, (name, "gated_convolution"), {name: options})
    model, ids = BasedForCausalLM(BasedConfig.of(shape)).double().eval(), prompts()
    randomize(model)
    assert torch.equal(generate(model, ids), greedy(model, ids, 5))
    assert torch.equal(generate(model, ids, use_cache=False), greedy(model, ids, 5))


def test_beams_with_and_without_the_state() -> None:
    model, ids = build(), prompts()
    options = {"num_beams": 3, "num_return_sequences": 2}
    got = generate(model, ids, **options)
    assert got.shape == (4, 16)
    assert torch.equal(got, generate(model, ids, use_cache=False, **options))
    assert not torch.equal(got[::2], greedy(model, ids, 5))


def test_sampling_draws_the_same_from_the_state_as_without() -> None:
    model, ids = build(), prompts()
    options = {"do_sample": True, "top_k": 20, "temperature": 1.5}
    torch.manual_seed(3)
    got = generate(model, ids, **options)
    torch.manual_seed(3)
    assert torch.equal(got, generate(model, ids, use_cache=False, **options))
    assert not torch.equal(got, greedy(model, ids, 5))


@pytest.mark.parametrize("beams", [1, 2])
def test_left_padded_batch_gives_what_each_prompt_gives_alone(beams: int) -> None:
    model, ids = build(), prompts(3, 9)
    mask = torch.arange(9) >= torch.tensor([[5], [0], [8]])
    padded = ids.masked_fill(~mask, 0)
    together = generate(model, padded, attention_mask=mask.long(), num_beams=beams)
    for row in range(3):
        alone = generate(model, ids[row : row + 1, mask[row]], num_beams=beams)
        assert torch.equal(together[row, 9:], alone[0, -5:])


def test_a_prompt_read_in_chunks() -> None:
    model, ids = build(), prompts(2, 11)
    mask = torch.arange(11) >= torch.tensor([[5], [0]])
    options = {"attention_mask": mask.long()}
    got = generate(model, ids, prefill_chunk_size=4, **options)
    assert torch.equal(got, generate(model, ids, **options))


def test_generation_ends_at_the_end_token() -> None:
    model, ids = build(), prompts(1)
    free = greedy(model, ids, 5)[0, 11:].tolist()
    end = next(t for t in free if free.index(t) > 1)
    got = generate(model, ids, eos_token_id=end)[0, 11:].tolist()
    assert got == free[: free.index(end) + 1]


def test_a_returned_cache_is_continued() -> None:
    model, ids = build(), prompts()
    want = greedy(model, ids, 6)
    first = generate(model, ids, 3, return_dict_in_generate=True)
    cache = first[CACHE]
    assert isinstance(cache, BasedCache)
    rest = generate(model, first.sequences, 3, **{CACHE: cache})
    assert torch.equal(rest, want)


def test_the_state_keeps_its_size() -> None:
    model = build(*FIXED)
    sizes = []
    for count in (2, 12):
        out = generate(model, prompts(), count, return_dict_in_generate=True)
        sizes.append(out[CACHE].nbytes)
    assert sizes[0] == sizes[1] == 2 * model.model.state_bytes(0)


def test_cache_rows_can_be_repeated_chosen_and_forgotten() -> None:
    model, ids, more = build(), prompts(), prompts(2, 1)
    whole = model(torch.cat([ids, more], 1)).logits[:, -1]
    cache = model(ids)[CACHE]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    got = model(more.flip(0), **{CACHE: cache}).logits[:, -1]
    torch.testing.assert_close(got, whole.flip(0), rtol=1e-9, atol=1e-9)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length(), len(cache)) == (0, 0, 0)
    torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, model(ids).logits)


# torch.compile traces through a cached function of the Taylor features.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_static_cache_compiles_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(*FIXED), prompts()
    whole = CompileConfig(fullgraph=True, backend="eager", mode=None)
    whole._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # The checks of shapes are Python that is no part of the model.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    got = generate(model, ids, cache_implementation="static", compile_config=whole)
    assert torch.equal(got, greedy(model, ids, 5))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_read_by_either_side(tmp_path: Path, dtype: torch.dtype) -> None:
    model, ids = build(dtype=dtype), prompts()
    want = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours = load_model(tmp_path / "theirs")
    assert ours.dtype == dtype
    torch.testing.assert_close(ours(ids)[0], want, rtol=0, atol=0)
    save_model(ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours").to_dict() == config().to_dict()
    for folder in ("theirs", "ours"):
        back = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto")
        assert type(back) is BasedForCausalLM
        assert back.dtype == dtype
        torch.testing.assert_close(back(ids, use_cache=False).logits, want, rtol=0, atol=0)
        assert back.lm_head.weight is back.model.embedding.weight


def test_loading_onto_a_dtype_a_device_map_and_the_meta_device(tmp_path: Path) -> None:
    model, ids = build(dtype=torch.float32), prompts()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for placed in ("cpu", "auto", {"": "cpu"}):
        back = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=placed)
        torch.testing.assert_close(back(ids).logits, model(ids).logits)
        assert torch.equal(generate(back, ids), greedy(model, ids, 5))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert sum(p.numel() for p in empty.parameters()) == model.model.num_parameters()


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    state = model.state_dict()
    del state["model.blocks.0.mixer.conv_weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(BasedError, match=r"lacks weights of the model: model\.blocks\.0\.mixer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(_whole(tmp_path), output_loading_info=True)
    assert not info["missing_keys"]


def _whole(tmp_path: Path) -> Path:
    build(dtype=torch.float32).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def test_a_grown_vocabulary_is_saved_and_read(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    assert model.lm_head.weight is model.model.embedding.weight
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.vocab_size == VOCABULARY + 4


def test_initialisation_is_the_decoders() -> None:
    hub = BasedConfig.of(DecoderConfig(500, 128, 512, FIXED[:1] * 8))
    block = BasedForCausalLM(hub).model.blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model saved by our side with a tokenizer, as `based train` does."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(["fellow citizens of the senate " * 20], 280)
    tokenizer.save(folder / "tokenizer.json")
    shape = DecoderConfig(tokenizer.vocab_size, 32, 48, FIXED, OPTIONS)
    save_model(Decoder(shape), folder / "m", folder / "tokenizer.json")
    return folder / "m"


def test_our_tokenizer_is_theirs_too(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer("fellow citizens").input_ids
    assert tokenizer.decode(ids) == "fellow citizens"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id
    assert GenerationConfig.from_model_config(
        AutoConfig.from_pretrained(trained)
    ).eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_a_streamer_gets_the_text(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    prompt = tokenizer("fellow citizens", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    out = model.generate(**prompt, streamer=streamer, **options)
    new = out[0, prompt.input_ids.shape[1] :]
    assert "".join(streamer) == tokenizer.decode(new)


def run(script: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    return done.stdout


def test_a_process_that_never_imports_based_loads_what_carries_its_code(
    trained: Path, tmp_path: Path
) -> None:
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True); "
        "model.save_pretrained(sys.argv[2]); "
        "print(float(model(torch.arange(5)[None]).logits.detach().double().sum()))"
    )
    again = tmp_path / "again"
    got = float(run(script, trained, again, HF_HOME=str(tmp_path / "home")))
    model = load_model(trained)
    want = float(model(torch.arange(5)[None])[0].detach().double().sum())
    assert got == pytest.approx(want, abs=1e-3)
    for folder in (trained, again):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == {auto: f"modeling_based.{name}" for auto, name in AUTO.items()}
        assert (folder / "modeling_based.py").read_bytes() == HUB_CODE.read_bytes()


def test_importing_our_models_registers_and_costs_no_transformers() -> None:
    script = (
        "import sys, based.models; print('transformers' in sys.modules); "
        "from transformers import AutoConfig; print(type(AutoConfig.for_model('based')).__name__, "
        "'transformers.modeling_utils' in sys.modules); "
        "from transformers import AutoModelForCausalLM as Auto; "
        "print(Auto._model_mapping[type(AutoConfig.for_model('based'))].__name__)"
    )
    assert run(script).split("\n")[:3] == ["False", "BasedConfig False", "BasedForCausalLM"]
