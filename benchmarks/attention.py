"""The faster of torch's attention kernels for a Transformer's shape, timed before it is used."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from based.models import DecoderConfig

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def best_attention(
    shape: DecoderConfig, length: int, device: torch.device, backward: bool
) -> AbstractContextManager[str | None]:
    """SDPA with its faster kernel, for models of softmax attention; enters as its name."""
    softmax = [options for name, options in shape.mixer_options.items() if "softmax" in name]
    if device.type != "cuda" or not softmax:
        return nullcontext(None)
    heads = softmax[0]["num_heads"]
    size = (max(1, 16384 // length), heads, length, shape.hidden_size // heads)
    times = {backend: attention_seconds(backend, size, backward) for backend in BACKENDS}
    return Chosen(min(times, key=lambda backend: times[backend]))


class Chosen(AbstractContextManager[str]):
    """SDPA with one kernel; enters as its name."""

    def __init__(self, backend: SDPBackend) -> None:
        self.backend, self._inner = backend, sdpa_kernel(backend)

    def __enter__(self) -> str:
        self._inner.__enter__()
        return self.backend.name.lower()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)


def attention_seconds(backend: SDPBackend, size: tuple[int, ...], backward: bool) -> float:
    """Of a pass forward, and back if wanted; infinite where the kernel does not take the shape."""
    q, k, v = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
        for _ in range(3)
    )
    times = []
    try:
        with sdpa_kernel(backend):
            for _ in range(8):
                torch.cuda.synchronize()
                began = time.perf_counter()
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                if backward:
                    out.backward(q)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
    except RuntimeError:
        return float("inf")
    return statistics.median(times[3:])
