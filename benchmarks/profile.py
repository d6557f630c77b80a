"""Where a step's time goes on a GPU, by kind of kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What torch.compile makes is named after all that it merged, copies and convolutions too.
COMPILED = re.compile(r"triton_(poi|red|per)_")
# The first pattern that another kernel's name matches is its kind.
KINDS = {
    "attention": r"flash|fmha|sdpa|mha_|window|attention_step|_join",
    "Taylor linear attention": r"taylor|_fold|sum_states|carry_states|attend|(query|key)_grad",
    "scan": r"scan|chunk_state|ssd",
    "convolution": r"conv",
    "communication": r"nccl",
    "matrix products": (
        r"gemm|gemv|_linear_kernel|_tile_kernel|^product_|cutlass|nvjet|cublas|xmma|splitk"
    ),
    "optimiser": r"adam|multi_tensor|foreach|lp?norm",
    "copies": r"mem(cpy|set)|copy|cat|fill",
    "sampling": r"_sample",
    "elementwise and norms": r"triton|elementwise|reduce|rms|softmax|embedding|index|swiglu",
}


def kind_of(kernel: str) -> str:
    """A kernel's kind, from its name."""
    name = kernel.lower()
    if COMPILED.match(name):
        return "elementwise and norms"
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums (name, time) by kind, largest first."""
    total: dict[str, float] = {}
    for name, time in kernels:
        total[kind_of(name)] = total.get(kind_of(name), 0.0) + time
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def moved_on(kernels: Iterable[tuple[str, float, float]]) -> Iterator[tuple[str, float]]:
    """(name, time) of (name, start, end): by how much each kernel's end is the latest so far.

    Of kernels that overlap nothing is counted twice, and one hidden behind another takes no time.
    """
    latest = float("-inf")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[2]):
        yield name, end - max(start, latest)
        latest = end


def profiled(function: Callable[[], object], calls: int = 1) -> dict[str, float]:
    """Milliseconds of GPU time of one call, by kind of kernel; the mean of some."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return by_kind((name, time / 1e3 / calls) for name, time in moved_on(kernels))
