"""Full rings folded on Hopper in CUDA C++ (`fold.cu`): many heads, their states in halves."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from based.ops import cuda, kernels

FEATURE_DIM, RING, LARGEST_HEAD_DIM = 16, 16, 128
# Multiprocessors of an H100 or H200, bytes that the programs of one share, and how many programs,
# of so many warps each, it has registers for.
MULTIPROCESSORS, SHARED, MOST_PROGRAMS, WARPS = 132, 227 * 1024, 5, 4
# Features of a tile, and rows among which full rings are looked for at a time.
FEATURES, ROOM = 16, 1024


def takes(numerator: Tensor, recent_keys: Tensor, recent_values: Tensor) -> bool:
    """Whether the kernel folds such rings into such a state."""
    (R, _, K), V = recent_keys.shape[1:], recent_values.shape[3]
    fits = (R, K) == (RING, FEATURE_DIM) and V % 16 == 0 and V <= LARGEST_HEAD_DIM
    halves = numerator.dtype == torch.int16 and recent_values.dtype == torch.bfloat16
    if not (fits and halves and kernels.HOPPER) or torch.compiler.is_compiling():
        return False
    return cuda.is_hopper(numerator.device)


def fold(
    numerator: Int16[Tensor, "B H 2 F V"],
    denominator: Float[Tensor, "B H F"],
    recent_keys: Float[Tensor, "B R H K"],
    recent_values: Float[Tensor, "B R H V"],
    seen: Int[Tensor, " B"],
) -> None:
    """Adds the rings of rows whose token `seen` is a ring's last to their states, in place."""
    (B, H, F), V = denominator.shape, recent_values.shape[3]
    warps = B * H * -(-F // FEATURES)
    run, programs = _kernel(H, F, V, numerator.device)
    given = numerator, denominator, recent_keys, recent_values, seen, B
    overlap = kernels.overlap(seen, reads_state=True)["OVERLAP"]
    run(min(programs, -(-warps // WARPS)), 32 * WARPS, *given, overlap=overlap)


@cache
def _kernel(H: int, F: int, V: int, device: torch.device) -> tuple[Callable[..., None], int]:
    """The kernel, and how many programs of it run at a time."""
    # A warp's features, upper and lower halves, and values, in padded lines, and keys.
    of_warp = (2 * FEATURES + RING) * (2 * V + 16) + RING * 2 * FEATURE_DIM
    shared = WARPS * of_warp + 4 * ROOM + 4
    # Of each program the driver keeps 1 KiB.
    programs = MULTIPROCESSORS * min(MOST_PROGRAMS, SHARED // (shared + 1024))
    return cuda.compile_kernel("fold_rings", source(H, F, V), shared, device), programs


def source(H: int, F: int, V: int) -> str:
    """The text of the kernel."""
    constants: dict[str, int | bool | str] = {"H": H, "F": F, "V": V, "WARPS": WARPS, "ROOM": ROOM}
    return cuda.source_of([Path(__file__).with_name("fold.cu")], constants, ())
