"""What a training run is: every choice that changes its result, and how often it reports."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from based.data import TokenDataset
from based.errors import BasedError
from based.models import DecoderConfig, preset

# Options that may differ when a run goes on: they change its numbers by rounding at most.
FREE = (
    *("evaluate_every", "evaluate_windows", "checkpoint_every", "keep_checkpoints"),
    *("micro_batch", "segment", "recompute", "compile", "context_parallel", "shards"),
)


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; the defaults suit the small presets and a CPU."""

    data: Path
    """A data directory made by `based data`; evaluation reads its held-out text."""
    mixture: tuple[tuple[Path, float], ...] = ()
    """More data directories, each with its share of the sequences (0 to 1); `data` has the rest."""
    separate_documents: bool = False
    """Let nothing pass from one document of a sequence to the next."""
    preset: str = "based-tiny"
    """Which model; `based info PRESET` describes it. Its vocabulary becomes the data's."""
    feature_dim: int | None = None
    """Dial of the preset: features a query and key are projected to."""
    window: int | None = None
    """Dial of the preset: keys a query sees, its own included."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 8
    """Sequences a step, all ranks together."""
    micro_batch: int | None = None
    """Sequences that a rank computes at a time, to save memory; all of its own unless given."""
    length: int = 512
    """Tokens a sequence."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    final_learning_rate: float = 0.1
    """What the cosine ends at, as a share of the peak."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's, on matrices; norms and biases have none."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    clip: float = 1.0
    """Largest gradient norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations; weights are float32. auto is bfloat16 on a GPU, float32 elsewhere."""
    compile: bool = False
    """Compile each kind of block (torch.compile)."""
    recompute: bool = False
    """Compute a block's activations anew in the backward pass, to save memory."""
    segment: int | None = None
    """Tokens of a sequence computed at a time, exactly, for sequences that do not fit in memory."""
    context_parallel: int = 1
    """Ranks that share the tokens of each sequence."""
    shards: int | None = None
    """Ranks that hold one copy of the weights between them; all unless given."""
    seed: int = 0
    """Of initial weights and data order."""
    evaluate_every: int = 200
    """Steps between evaluations; the last step is always evaluated."""
    evaluate_windows: int = 64
    """Windows of held-out text an evaluation during training reads; the last reads all."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "micro_batch", "length", "segment", "context_parallel")
        others = ("shards", "evaluate_every", "evaluate_windows", "checkpoint_every")
        for name in (*positive, *others, "keep_checkpoints"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BasedError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise BasedError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.length % self.context_parallel:
            raise BasedError(
                f"length {self.length} does not divide into {self.context_parallel} shards; "
                "choose context_parallel among its divisors"
            )

    def sequences_of_rank(self, data_ranks: int) -> int:
        """Sequences a step that each of the data-parallel ranks has."""
        if self.batch_size % data_ranks:
            raise BasedError(
                f"batch_size {self.batch_size} does not divide among {data_ranks} ranks; "
                "choose it among their multiples"
            )
        return self.batch_size // data_ranks

    def dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of activations and of the weights they meet."""
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        return auto if self.precision == "auto" else getattr(torch, self.precision)

    def model_config(self, dataset: TokenDataset) -> DecoderConfig:
        """The preset's shape, with the data's vocabulary padded to a multiple of 8."""
        shape = preset(self.preset, feature_dim=self.feature_dim, window=self.window)
        return replace(shape, vocab_size=-(-dataset.vocab_size // 8) * 8)

    def save(self, path: Path) -> None:
        """Writes the options as JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return json.loads(json.dumps(asdict(self), default=str))

    def check_same_run(self, path: Path) -> None:
        """Refuses to go on with a run whose saved options in `path` are others."""
        try:
            saved = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BasedError(f"cannot read the run's options in {path}: {error}") from error
        mine = self.as_dict()
        defaults = TrainConfig(self.data).as_dict()
        for field in fields(self):
            before = saved.get(field.name, defaults.get(field.name))
            if field.name not in FREE and before != mine[field.name]:
                raise BasedError(
                    f"the run in {path.parent} was begun with {field.name} {before}, not "
                    f"{mine[field.name]}; give the same options, or another directory"
                )
