"""ThunderKittens' Based kernel (MIT), built from a checkout; it needs nvcc and a Hopper GPU.

The kernel computes the numerator alone, forward alone, for feature_dim 16, head_dim 64 and
lengths that 64 divides; it waits for the device before and after itself, so that no graph
can hold it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from based.errors import BasedError
from benchmarks.timing import Case, Function

SOURCE = Path("kernels/based/linear_attn.cu")
FLAGS = (
    *("-std=c++20", "-O3", "--use_fast_math", "-DNDEBUG", "-DTORCH_COMPILE", "-DKITTENS_HOPPER"),
    *("--expt-extended-lambda", "--expt-relaxed-constexpr"),
    *("-gencode=arch=compute_90a,code=sm_90a", "-lcuda"),
)


def takes(case: Case) -> bool:
    """Whether the kernel computes such a layer."""
    return case.head_dim == 64 and case.tokens % 64 == 0


def load(checkout: Path) -> Function:
    """A function of q, k [B, H, T, 16] and v [B, H, T, 64], contiguous; returns [B, H, T, 64]."""
    if not (checkout / SOURCE).exists():
        raise BasedError(f"{checkout} is no checkout of ThunderKittens: it has no {SOURCE}")
    from torch.utils import cpp_extension

    module: Any = cpp_extension.load(
        "thunderkittens_based",
        [str(checkout / SOURCE)],
        extra_include_paths=[str(checkout / "include"), str(checkout / "prototype")],
        extra_cflags=["-std=c++20"],
        extra_cuda_cflags=list(FLAGS),
        extra_ldflags=["-lcuda"],
    )

    def based(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module.based(q, k, v)[0]

    return based
