"""A probe of associative recall small enough for a CPU: two layers, ten seconds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from based.models import Decoder, DecoderConfig
from based.recall.mqar import IGNORE, mqar


@dataclass(frozen=True)
class Probe:
    """The task and its training; the defaults are the demo's."""

    length: int = 64
    pairs: int = 8
    vocab_size: int = 64
    hidden_size: int = 64
    num_heads: int = 1
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 3e-3
    test_examples: int = 512
    seed: int = 0

    def model_config(self, mixer: str, **options: int) -> DecoderConfig:
        """A gated convolution, then the mixer in question, as in the paper's section 3."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            mixers=("gated_convolution", mixer),
            mixer_options={mixer: {"num_heads": self.num_heads, **options}},
            # Wider than a language model's: recall is found in a tenth of the steps.
            initializer_range=0.1,
        )


@dataclass(frozen=True)
class ProbeResult:
    """How often the value of a queried key is the most likely token."""

    accuracy: float
    standard_error: float
    state_bytes: int
    """Of one sequence at the end of the task, float32."""


def run_probe(
    probe: Probe, config: DecoderConfig, on_step: Callable[[int, float], None] | None = None
) -> ProbeResult:
    """Trains the model on fresh examples and tests it on others; `on_step(step, loss)`."""
    torch.manual_seed(probe.seed)
    generator = torch.Generator().manual_seed(probe.seed)
    model = Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=probe.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, probe.learning_rate, total_steps=probe.steps, pct_start=0.1
    )
    for step in range(probe.steps):
        inputs, labels = mqar(
            probe.batch_size, probe.length, probe.pairs, probe.vocab_size, generator=generator
        )
        loss = F.cross_entropy(*_answers(model, inputs, labels))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    return _test(model, probe, generator)


@torch.no_grad()
def _test(model: Decoder, probe: Probe, generator: torch.Generator) -> ProbeResult:
    inputs, labels = mqar(
        probe.test_examples, probe.length, probe.pairs, probe.vocab_size, generator=generator
    )
    logits, answers = _answers(model, inputs, labels)
    right = (logits.argmax(-1) == answers).double().reshape(probe.test_examples, -1).mean(1)
    return ProbeResult(
        accuracy=right.mean().item(),
        standard_error=(right.std() / probe.test_examples**0.5).item(),
        state_bytes=model.state_bytes(probe.length),
    )


def _answers(
    model: Decoder, inputs: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]
) -> tuple[Tensor, Tensor]:
    """Logits [Q, V] and labels [Q] of the queries alone."""
    queries = labels != IGNORE
    hidden, _ = model.hidden(inputs)
    return model.logits(hidden[queries]), labels[queries]
