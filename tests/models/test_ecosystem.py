"""What people do with a Hugging Face model, done with ours, each on a tiny one."""

import json
from pathlib import Path

import lm_eval
import pytest
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from trl import SFTConfig, SFTTrainer

from based.data import train_tokenizer
from based.models import Decoder, DecoderConfig, load_model, save_model

MIXERS = ("gated_convolution", "taylor_linear_attention", "sliding_window_attention")
OPTIONS = {
    "taylor_linear_attention": {"num_heads": 2, "feature_dim": 4},
    "sliding_window_attention": {"num_heads": 2, "window": 5},
}
TEXT = "fellow citizens of the senate and of the house "


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer([TEXT * 20], 280)
    tokenizer.save(folder / "tokenizer.json")
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(tokenizer.vocab_size, 32, 48, MIXERS, OPTIONS))
    save_model(model, folder / "m", folder / "tokenizer.json")
    return folder / "m"


def load(saved: Path, **options):
    return AutoModelForCausalLM.from_pretrained(saved, **options)


def arguments(folder: Path, **options) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_pipeline(saved: Path) -> None:
    generate = pipeline("text-generation", model=str(saved))
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = generate("fellow", **options)[0]["generated_text"]
    assert alone.startswith("fellow")
    generate.tokenizer.padding_side = "left"
    batch = generate(["fellow", TEXT], batch_size=2, **options)
    assert batch[0][0]["generated_text"] == alone


def test_trainer_trains_saves_and_resumes(saved: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    data = Dataset.from_list([dict(tokenizer(TEXT[: 9 + n])) for n in range(24)])

    def trainer(**options) -> Trainer:
        return Trainer(
            model=load(saved),
            args=TrainingArguments(**arguments(tmp_path, save_steps=4, **options)),
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )

    whole = trainer()
    whole.train()
    got = losses(whole)
    assert got[-1] < got[0] - 0.5
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again)[-2:] == pytest.approx(got[-2:], rel=1e-4)
    ids = torch.arange(5)[None]
    ours = load_model(tmp_path / "checkpoint-6")
    torch.testing.assert_close(ours(ids)[0], whole.model.eval()(ids).logits)


def test_lora_trains_few_weights_and_merges(saved: Path, tmp_path: Path) -> None:
    ids = torch.randint(1, 200, (2, 12))
    base = load(saved)
    before = base(ids).logits.detach()
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    trained, total = tuned.get_nb_trainable_parameters()
    assert 0 < trained < total
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    for _ in range(3):
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = tuned.eval()(ids).logits
    assert (want - before).abs().max() > 1e-3
    tuned.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(load(saved), tmp_path)
    torch.testing.assert_close(back.eval()(ids).logits, want)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(back.generate(ids, **options), tuned.generate(ids, **options))
    merged = back.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_sft(saved: Path, tmp_path: Path, lora: bool) -> None:
    trainer = SFTTrainer(
        model=load(saved),
        args=SFTConfig(
            **arguments(tmp_path, save_strategy="no"),
            bf16=False,
            max_length=24,
        ),
        train_dataset=Dataset.from_dict({"text": [TEXT] * 12}),
        processing_class=AutoTokenizer.from_pretrained(saved),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    trainer.train()
    got = losses(trainer)
    assert got[-1] < got[0]


def test_evaluation_harness_on_a_local_task(saved: Path, tmp_path: Path) -> None:
    documents = [{"text": f"fellow {w}", "answer": " of"} for w in ("citizens", "house", "senate")]
    lines = "\n".join(json.dumps(d) for d in documents)
    (tmp_path / "documents.jsonl").write_text(lines)
    (tmp_path / "local.yaml").write_text(
        f"""
task: local_completion
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "documents.jsonl"}}}}}
test_split: test
output_type: OUTPUT
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
""".replace("OUTPUT", "loglikelihood")
        + "metric_list: [{metric: perplexity}, {metric: acc}]\n"
    )
    model = load(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2)
    found = lm_eval.simple_evaluate(
        model=harness,
        tasks=["local_completion"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    got = found["results"]["local_completion"]["perplexity,none"]
    scores = []
    for document in documents:
        prompt = tokenizer(document["text"]).input_ids
        answer = tokenizer(document["answer"]).input_ids
        logits = model(torch.tensor([prompt + answer])).logits[0].detach().log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        scores.append(sum(float(logits[r, t]) for r, t in zip(rows, answer, strict=True)))
    assert got == pytest.approx(float(torch.tensor(scores).mean().neg().exp()), rel=1e-4)


def test_int8_weights(saved: Path) -> None:
    ids = torch.randint(1, 200, (2, 12))
    exact = load(saved)
    quantized = load(saved, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    weight = quantized.model.blocks[0].mlp.fc1.weight
    assert type(weight) is not torch.nn.Parameter
    got, want = quantized(ids).logits, exact(ids).logits
    assert 0 < (got - want).abs().max() < 0.05 * want.std()
    options = {"max_new_tokens": 4, "do_sample": False}
    got = quantized.generate(ids, **options)
    assert torch.equal(got, quantized.generate(ids, use_cache=False, **options))
