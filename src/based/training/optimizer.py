"""AdamW and its learning rate."""

import math

import torch
from torch import nn

from based.mixers import Mixer
from based.training.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on tensors of two axes and more, so none on norms and biases.

    Nor on what a mixer names as `undecayed`: Mamba's decay rates, for one.
    """
    mixers = (module for module in model.modules() if isinstance(module, Mixer))
    exempt = {id(getattr(mixer, name)) for mixer in mixers for name in mixer.undecayed}
    decayed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in exempt]
    others = [p for p in model.parameters() if p.dim() < 2 or id(p) in exempt]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to `final_learning_rate` of the peak; step counts from 0."""
    warmup = min(config.warmup_steps, config.steps - 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(config.steps - warmup, 1)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    low = config.final_learning_rate
    return config.learning_rate * (low + (1 - low) * cosine)
