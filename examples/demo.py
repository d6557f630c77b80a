"""`make demo`: three small models on the same text, and what their memories are worth.

Based, a Transformer++ and a window-only model of one size read the same tokens in
the same order. Then: what each predicts, what each recalls, and what remembering
costs. Two CPU cores, a few minutes; everything is written to demo-output/.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from based.data import Tokenizer
from based.data.documents import CORPUS
from based.data.prepare import prepare
from based.evaluation import Perplexity, paired_difference
from based.generation import Sampling, stream_text
from based.models import Decoder
from based.models.command import human
from based.recall import Probe, ProbeResult, run_probe
from based.training import TrainConfig, Trainer
from based.training.progress import TrainingProgress
from based.training.reports import Step
from benchmarks.decoding import decode_cost
from examples.picture import draw

OUT = Path("demo-output")
CONTEXTS = (1_000, 100_000)
BEYOND = 1_000_000
# Two seeds of one model and these options differ by up to this, in nats a token.
SEED_NOISE = 0.09
PROMPT = "Fellow citizens, the state of our Union"


@dataclass
class Contestant:
    """One of the three models, and what is learned about it."""

    name: str
    preset: str
    mixer: str
    options: dict[str, int]
    learning_rate: float
    """The best of those tried for this model, between 2e-3 and 2e-2."""
    model: Decoder | None = None
    perplexity: Perplexity | None = None
    probe: ProbeResult | None = None
    losses: list[float] | None = None
    costs: dict[int, tuple[int, float]] | None = None


def contestants() -> list[Contestant]:
    return [
        Contestant("Based", "based-tiny", "taylor_linear_attention", {"feature_dim": 16}, 2e-2),
        Contestant("Transformer++", "attn-tiny", "softmax_attention", {}, 4e-3),
        Contestant("window only", "window-tiny", "sliding_window_attention", {"window": 17}, 2e-2),
    ]


def config(one: Contestant) -> TrainConfig:
    return TrainConfig(
        data=OUT / "data",
        preset=one.preset,
        steps=500,
        batch_size=2,
        length=512,
        learning_rate=one.learning_rate,
        evaluate_every=500,
        checkpoint_every=250,
    )


class Recording(TrainingProgress):
    """Live progress that also keeps the losses and the last evaluation."""

    def __init__(self, console: Console, steps: int, name: str) -> None:
        super().__init__(console, steps, name)
        self.losses: list[float] = []
        self.result: Perplexity | None = None

    def on_step(self, step: Step) -> None:
        super().on_step(step)
        self.losses.append(step.loss)

    def on_evaluation(self, step: int, result: Perplexity) -> None:
        self.result = result


def train(console: Console, one: Contestant) -> None:
    options = config(one)
    progress = Recording(console, options.steps, f"{one.name:<13}")
    with progress:
        trainer = Trainer(options, OUT / one.preset, progress, torch.device("cpu"))
        one.model = trainer.train()
    one.perplexity, one.losses = progress.result, progress.losses


def show_perplexities(console: Console, all_of_them: list[Contestant]) -> None:
    table = Table("model", "parameters", "all", "recall hits", "the rest", title="Perplexity")
    for one in all_of_them:
        assert one.model is not None
        assert one.perplexity is not None
        groups = (f"{one.perplexity.perplexity(group):.1f}" for group in ("all", "hits", "rest"))
        table.add_row(one.name, f"{one.model.num_parameters():,}", *groups)
    console.print(table)
    share = all_of_them[0].perplexity.share("hits")  # type: ignore[union-attr]
    console.print(
        f"Recall hits are the {share:.0%} of held-out tokens whose bigram stood earlier in the "
        "512 tokens of context."
    )
    first = all_of_them[0]
    for other in all_of_them[1:]:
        console.print("  " + compare(first, other))
    console.print(
        f"  (one training run each; another seed moves a model's loss by up to {SEED_NOISE} nats, "
        "so a smaller difference counts as noise)\n"
    )


def compare(a: Contestant, b: Contestant) -> str:
    """Who predicts better on recall hits and on the rest, or that it is noise."""
    assert a.perplexity is not None
    assert b.perplexity is not None
    parts = []
    for group, name in (("hits", "recall hits"), ("rest", "the rest")):
        d = paired_difference(a.perplexity, b.perplexity, group)
        numbers = f"{d.mean:+.3f} ± {d.standard_error:.3f} nats"
        noise = d.within_noise or abs(d.mean) <= SEED_NOISE
        winner = "within noise" if noise else f"{(a if d.mean < 0 else b).name} is better"
        parts.append(f"{name} {numbers} ({winner})")
    return f"{a.name} against {b.name}: " + "; ".join(parts)


def probe_recall(console: Console, all_of_them: list[Contestant]) -> None:
    probe = Probe()
    console.print(
        f"[bold]Associative recall[/]: {probe.pairs} key-value pairs, then each key again; what "
        f"was its value? Guessing scores {1 / (probe.vocab_size // 2):.0%}."
    )
    with Progress(console=console, transient=True) as progress:
        for one in all_of_them:
            task = progress.add_task(f"probe of {one.name}", total=probe.steps)
            shape = probe.model_config(one.mixer, **one.options)
            one.probe = run_probe(
                probe, shape, lambda step, loss, task=task: progress.update(task, completed=step)
            )
    table = Table("mixer behind a convolution", "recalled", "state of a sequence")
    for one in all_of_them:
        assert one.probe is not None
        accuracy = f"{one.probe.accuracy:.1%} ± {one.probe.standard_error:.1%}"
        table.add_row(one.mixer, accuracy, human(one.probe.state_bytes))
    console.print(table)
    console.print("The window holds 17 tokens: pairs further back are gone.\n")


def continue_text(console: Console, one: Contestant) -> None:
    assert one.model is not None
    console.print(f"[bold]{one.name} continues[/] (after {500 * 1024:,} tokens of training):")
    tokenizer = Tokenizer.load(OUT / "data")
    text = PROMPT
    console.print(PROMPT, end="", style="green")
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=1, max_new_tokens=90)
    for piece in stream_text(one.model, tokenizer, PROMPT, sampling):
        console.print(piece, end="", markup=False, highlight=False)
        text += piece
    (OUT / "continuation.txt").write_text(text + "\n")
    console.print("\n")


def measure_memory(console: Console, pair: list[Contestant]) -> None:
    table = Table(
        "model",
        "context",
        "state of a sequence",
        "ms a token",
        "",
        title="Memory and time a token while generating",
    )
    for one in pair:
        assert one.model is not None
        one.costs = {}
        for context in CONTEXTS:
            one.costs[context] = decode_cost(one.model, context)
            size, ms = one.costs[context]
            table.add_row(one.name, f"{context:,}", human(size), f"{ms:.2f}", "measured")
        size = one.model.state_bytes(BEYOND, torch.float32)
        table.add_row(one.name, f"{BEYOND:,}", human(size), "-", "computed")
    console.print(table)
    console.print("The Transformer's KV cache was filled with random keys and values.\n")


def summarise(console: Console, based: Contestant, attention: Contestant, began: float) -> None:
    assert based.costs is not None
    assert attention.costs is not None
    near, far = CONTEXTS
    ratio = attention.costs[far][1] / based.costs[far][1]
    memory = attention.costs[far][0] / based.costs[far][0]
    console.print("[bold]What was seen[/]")
    console.print(
        f"- From {near:,} to {far:,} tokens of context Based's memory stayed "
        f"{human(based.costs[far][0])} and its token {based.costs[far][1]:.2f} ms "
        f"(it was {based.costs[near][1]:.2f}); the Transformer there needs {memory:,.0f} times "
        f"the memory and {ratio:.0f} times the time.\n"
        "- It recalls what a window of the same size of layer has lost. Where the table says "
        "'within noise', no claim is made.\n"
        "- These are toys, trained for a minute: they show mechanisms, not quality."
    )
    console.print(f"\nPicture: {OUT / 'demo.png'}. It all took {time.time() - began:.0f} s.")
    console.print("[bold]Next[/]")
    for line in (
        "based generate demo-output/based-tiny --prompt 'My fellow Americans,'",
        "based data data/mine FILES...; based train runs/mine --data data/mine",
        "based info based-1.3b",
    ):
        console.print(f"  .venv/bin/{line}", highlight=False)


def main() -> None:
    began, console = time.time(), Console()
    console.print("Three small models on the same text, and what their memories are worth.\n")
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    console.print("packing the corpus that ships with Based: 233 State of the Union addresses ...")
    packed = prepare([CORPUS], OUT / "data", vocab_size=2048)
    console.print(
        f"{packed.tokens['train']:,} tokens to train on, {packed.tokens['validation']:,} held out\n"
    )
    models = contestants()
    console.print(
        "[bold]Training[/] all three on the same 512,000 tokens, each at a rate found for it"
    )
    for one in models:
        train(console, one)
    show_perplexities(console, models)
    probe_recall(console, models)
    continue_text(console, models[0])
    measure_memory(console, models[:2])
    draw(models, OUT / "demo.png")
    summarise(console, models[0], models[1], began)


if __name__ == "__main__":
    main()
