"""What a run will take, known before it begins: `based train --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from based.data import TokenDataset
from based.errors import BasedError
from based.models import Decoder, DecoderConfig, preset
from based.models.accounting import training_flops
from based.models.command import human
from based.models.skeleton import skeleton
from based.training.config import TrainConfig

if TYPE_CHECKING:
    from rich.table import Table


# Of what blocks keep for their backward pass, compiled ones kept 0.4 to 0.6 on an H200.
COMPILED_SHARE = 0.6


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes are of one rank."""

    parameters: int
    ranks: int
    optimiser_bytes: int
    """Its shard of weights, gradients and both moments, float32."""
    gathered_bytes: int
    """All weights, and gradients summed over micro-batches, as long as a step needs them."""
    activation_bytes: int
    """What one micro-batch keeps for its backward pass, at most."""
    step_tokens: int
    micro_batches: int
    steps: int
    token_flops: int

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.steps * self.step_tokens

    @property
    def memory_bytes(self) -> int:
        """All of the above."""
        return self.optimiser_bytes + self.gathered_bytes + self.activation_bytes

    def duration(self, rate: float) -> timedelta:
        """At `rate` tokens a second and rank."""
        return timedelta(seconds=round(self.tokens / (rate * self.ranks)))

    def table(self, rate: float | None) -> Table:
        """For the terminal; with the time it takes if a rate is given."""
        from rich.table import Table

        rows = {
            "parameters": f"{self.parameters:,}",
            "ranks": f"{self.ranks:,}",
            "memory a rank": human(self.memory_bytes),
            "  weights and optimiser": human(self.optimiser_bytes),
            "  gathered weights": human(self.gathered_bytes),
            "  activations, at most": human(self.activation_bytes),
            "tokens a step": f"{self.step_tokens:,} in {self.micro_batches} micro-batches a rank",
            "steps": f"{self.steps:,}",
            "tokens": f"{self.tokens:,}",
            "operations": f"{self.tokens * self.token_flops:.3g}",
        }
        if rate is not None:
            rows["time"] = f"{self.duration(rate)} at {rate:,.0f} tokens/s a rank"
        table = Table(title="plan of the run", show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        return table


def make_plan(config: TrainConfig, ranks: int, device: torch.device) -> Plan:
    """Allocates nothing; without the data directory the preset's own vocabulary counts."""
    model = skeleton(_shape(config))
    if ranks % config.context_parallel or ranks % (config.shards or 1):
        raise BasedError(f"context_parallel and shards must divide the {ranks} ranks")
    sequences = config.sequences_of_rank(ranks // config.context_parallel)
    micro = min(config.micro_batch or sequences, sequences)
    dtype = config.dtype(device)
    parameters = model.num_parameters()
    micro_batches = -(-sequences // micro)
    segments = micro_batches > 1 or config.segment is not None
    sharded = ranks > 1 or dtype != torch.float32
    length = config.segment or config.length // config.context_parallel
    kept = micro * activation_bytes(model, length, dtype, config.recompute)
    if config.compile and not config.recompute:
        kept = round(COMPILED_SHARE * kept)
    return Plan(
        parameters=parameters,
        ranks=ranks,
        optimiser_bytes=16 * parameters // (config.shards or ranks),
        gathered_bytes=parameters * (dtype.itemsize + 4 * segments) if sharded else 0,
        activation_bytes=kept,
        step_tokens=config.batch_size * config.length,
        micro_batches=micro_batches,
        steps=config.steps,
        token_flops=training_flops(model, config.length),
    )


def activation_bytes(model: Decoder, length: int, dtype: torch.dtype, recompute: bool) -> int:
    """What one sequence of `length` keeps for the backward pass, uncompiled.

    Each kind of block runs without memory, and what autograd keeps besides weights is
    counted. Fused attention keeps no scores, so what grows with the square of the
    length is left out: it is fitted on three lengths.
    """
    model = model.to(dtype)
    blocks = dict(zip(model.config.mixers, model.blocks, strict=True))
    lengths = (512, 1024, 2048)
    kept = {}
    for name, block in blocks.items():
        fit = np.polyfit(lengths, [_kept_bytes(block, n) for n in lengths], 2)
        kept[name] = round(fit[1] * length + fit[2])
    if recompute:
        residual = length * model.config.hidden_size * 4
        return residual * len(model.blocks) + max(kept.values())
    return sum(kept[name] for name in model.config.mixers)


def _kept_bytes(block: nn.Module, length: int) -> int:
    weights = {id(parameter) for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in weights:
            storage = x.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(x)
        return x

    alive: list[torch.Tensor] = []
    (size,) = block.get_parameter("mixer_norm.weight").shape
    x = torch.empty(1, length, size, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        block(x, None, None)
    return sum(kept.values())


def _shape(config: TrainConfig) -> DecoderConfig:
    if (config.data / "meta.json").exists():
        return config.model_config(TokenDataset(config.data))
    return replace(preset(config.preset, feature_dim=config.feature_dim, window=config.window))
