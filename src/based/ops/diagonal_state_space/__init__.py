"""A diagonal linear state-space model, S4D (Gu et al. 2022): H3's memory."""

from based.ops.diagonal_state_space.chunked import diagonal_state_space
from based.ops.diagonal_state_space.step import diagonal_state_space_step

__all__ = ["diagonal_state_space", "diagonal_state_space_step"]
