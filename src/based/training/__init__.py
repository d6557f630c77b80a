"""Training: optimiser, loop, checkpoints, metrics."""

from based.training.config import TrainConfig
from based.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]
