"""Runs every kernel at small odd shapes, to be watched by NVIDIA's compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.sanitize

and likewise with `racecheck`, `initcheck` and `synccheck`. Words choose parts: `hopper`
(Taylor linear attention in CUDA C++), `taylor` (in Triton), `mixers`, `decoding`. Every
tensor is an allocation of its own, so that a step past its end is seen. Tests compare
numbers; here only NaNs end the run.
"""

from __future__ import annotations

import os
import sys

# Before torch starts: no cache between tensors and the driver.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

from itertools import product

import torch
from torch import Tensor

from based.generation import Engine, EngineConfig, Sampling
from based.mixers import build_mixer
from based.models import Decoder, DecoderConfig
from based.ops import kernels
from based.ops.stacked_cross_entropy import stacked_cross_entropy
from based.ops.taylor_linear_attention import num_features
from based.ops.taylor_linear_attention.kernels import launch
from based.ops.taylor_linear_attention.operator import _unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, HEADS = 333, 3


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def taylor(feature_dim: int, head_dim: int, dtype: torch.dtype, packed: bool) -> list[Tensor]:
    """Forward and backward with an initial state, over several strips."""
    rows = 1 if packed else 2
    edges = torch.tensor([0, 1, 1, 70, LENGTH], device=DEVICE) if packed else None
    shape = (4 if packed else rows, HEADS, num_features(feature_dim))
    q, k = (draw(rows, LENGTH, HEADS, feature_dim, dtype=dtype) for _ in range(2))
    v, d_out = (draw(rows, LENGTH, HEADS, head_dim, dtype=dtype) for _ in range(2))
    state = draw(*shape, head_dim), draw(*shape).abs()
    out, *final, inverse, states = launch.forward(q, k, v, *state, edges, want_state=True)
    gradients = launch.backward(q, k, v, edges, out, inverse, states, d_out, *final)
    return [out, *final, *gradients]


def mixers() -> None:
    """The other training kernels, through the mixers that have them."""
    recurrent = "mamba", "mamba2", "gated_linear_attention", "delta_net", "gated_delta_net", "rwkv7"
    window = "sliding_window_attention", {"num_heads": 3, "window": 9}
    for name, options in (("gated_convolution", {}), window, *((name, {}) for name in recurrent)):
        size = 64 if name in recurrent else 48
        mixer = build_mixer(name, size, **options).to(DEVICE)
        mixer(draw(2, 77, size))[0].sum().backward()
    hidden, head = draw(2, 5, 24).requires_grad_(), draw(2, 61, 24).requires_grad_()
    answers = torch.arange(5, device=DEVICE)
    stacked_cross_entropy(hidden, head, answers).sum().backward()


def decoding() -> None:
    """Every decode kernel, through the engine."""
    linear, window = "taylor_linear_attention", "sliding_window_attention"
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        mixers=("gated_convolution", linear, window, "softmax_attention"),
        mixer_options={
            linear: {"num_heads": 3, "feature_dim": 8},
            window: {"num_heads": 3, "window": 5},
            "softmax_attention": {"num_heads": 2, "num_kv_heads": 1},
        },
    )
    engine = Engine(Decoder(config).to(DEVICE), EngineConfig(slots=3, max_length=64, recent=3))
    engine.submit([1, 2, 3], Sampling(temperature=0.0, max_new_tokens=9))
    engine.submit([4], Sampling(top_k=7, top_p=0.9, max_new_tokens=5))
    while engine.busy:
        engine.step()


def taylor_cases(*choices: tuple) -> None:
    """Every combination of feature_dim, head_dim, dtype and packed."""
    launch.PROGRAMS = 2
    names = "out", "final", "normaliser", "d_q", "d_k", "d_v", "d_initial", "d_normaliser"
    for case in product(*choices):
        if _unsupported(*case[:3]) is not None:
            continue
        found = [name for name, x in zip(names, taylor(*case), strict=True) if x.isnan().any()]
        if found:
            what = f"feature_dim, head_dim, dtype, packed = {case}"
            raise SystemExit(f"NaN in {', '.join(found)} at {what}")


def main(parts: list[str]) -> None:
    torch.manual_seed(0)
    if "hopper" in parts:
        taylor_cases((16,), (16, 64, 112), (torch.bfloat16,), (False, True))
    kernels.HOPPER = False
    if "taylor" in parts:
        dtypes = torch.bfloat16, torch.float16, torch.float32
        taylor_cases((8, 16, 24, 32), (17, 64, 112), dtypes, (False, True))
    if "mixers" in parts:
        mixers()
    if "decoding" in parts:
        decoding()
    print(f"every kernel of {', '.join(parts)} ran")


if __name__ == "__main__":
    main(sys.argv[1:] or ["hopper", "taylor", "mixers", "decoding"])
