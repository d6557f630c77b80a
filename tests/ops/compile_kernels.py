"""Compiles kernels for a GPU that is not there: `python compile_kernels.py GROUP CAPABILITY`.

Launches are recorded instead of made, and what they would launch is compiled down to
machine code, whose shared memory must fit the GPU. The interpreter, in which the other
tests run kernels, takes much that the compiler refuses. `test_kernels_compile.py` runs
this in processes of its own, since the interpreter is chosen for a whole process.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from based.ops import kernels

GROUP, CAPABILITY = sys.argv[1], int(sys.argv[2])
# Bytes that a block may have, of the largest GPU of each capability that kernels are made for.
SHARED = {80: 163 * 1024, 90: 227 * 1024}[CAPABILITY]
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
BF16, F32 = torch.bfloat16, torch.float32
launches: list[tuple[JITFunction, tuple, dict[str, Any]]] = []
room = SHARED
# As kernels are launched on such a GPU.
pdl = {"OVERLAP": True, "launch_pdl": True} if CAPABILITY >= 90 else {"OVERLAP": False}
kernels.overlap = lambda x, **_: pdl  # pyright: ignore[reportAttributeAccessIssue]


def record(self: JITFunction, grid: Any) -> Callable[..., None]:
    return lambda *arguments, **options: launches.append((self, arguments, options))


JITFunction.__getitem__ = record  # pyright: ignore[reportAttributeAccessIssue]


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def compiled(function: JITFunction, arguments: tuple, options: dict[str, Any]) -> Any:
    """What the launch would run."""
    own = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
    choices = {name: options.pop(name) for name in own if name in options}
    values = {**dict(zip(function.arg_names, arguments, strict=False)), **options}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[place,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=choices)


def taylor(feature_dim: int, head_dim: int, dtype: torch.dtype) -> None:
    from based.ops.taylor_linear_attention.kernels import launch
    from based.ops.taylor_linear_attention.operator import SHARED_MEMORY, _unsupported

    global room
    if _unsupported(feature_dim, head_dim, dtype, SHARED):
        return
    if CAPABILITY < 90:
        # What the dispatch believes of the largest head_dim of its kind.
        room = 1024 * SHARED_MEMORY[dtype == F32, feature_dim > 16][128 if head_dim > 64 else 64]
    q, k = (empty(2, 2048, 2, feature_dim, dtype=dtype) for _ in range(2))
    v = empty(2, 2048, 2, head_dim, dtype=dtype)
    launch.PROGRAMS = 4  # several strips, each of several segments
    out, *final, inverse, states = launch.forward(q, k, v, None, None, None, want_state=True)
    launch.backward(q, k, v, None, out, inverse, states, v, *final)


def window(head_dim: int, dtype: torch.dtype) -> None:
    from based.ops.sliding_window_attention.kernels import launch

    q = empty(2, 512, 2, head_dim, dtype=dtype)
    for size in (129, 4096):
        out, lse = launch.forward(q, q, q, size, None, None)
        launch.backward(q, q, q, size, None, None, out, lse, q)


def around() -> None:
    from based.ops.elementwise_decode import (
        add_rms_norm_kernel,
        embed_kernel,
        embed_with_squares_kernel,
        swiglu_kernel,
    )
    from based.ops.gated_short_convolution import triton as convolution
    from based.ops.selective_scan import triton as scan
    from based.ops.stacked_cross_entropy.triton import softmax_gradient_kernel_

    x, weight = empty(2, 512, 2 * 3584), empty(3584, 3)
    convolution.forward(x, weight, None, None)
    convolution.backward(x, weight, None, None, x[..., :3584].contiguous())
    softmax_gradient_kernel_(empty(4, 64, 8192), empty(64, dtype=torch.int64), 1.0)
    x, state = empty(2, 512, 256, dtype=F32), empty(2, 256, 16, dtype=F32)
    sizes, b = (x, x, empty(1, 256, 16, dtype=F32)), empty(2, 512, 16, dtype=F32)
    scan._scan._init_fn(*sizes, b, b, state, keep=False)
    _, last, marks = scan._scan._init_fn(*sizes, b, b, state, keep=True)
    scan._scan_backward._init_fn(*sizes, b, b, marks, x, last)
    norm = empty(4, 1792, dtype=F32), empty(4, 4, 1792, dtype=F32), empty(1792), 1e-5
    add_rms_norm_kernel(*norm)
    tokens, table = empty(4, dtype=torch.int64), empty(96, 1792)
    embed_kernel(tokens, table)
    embed_with_squares_kernel(tokens, table, empty(1792), 64)
    swiglu_kernel(empty(4, 7168))


def rows() -> None:
    from based.ops.outer_product import operator as products
    from based.ops.row_norm import operator as norm
    from based.ops.short_convolution import operator as convolution

    for dtype in (F32, BF16):
        x, weight, taps = (empty(*s, dtype=dtype) for s in ((4, 256, 128), (4, 128), (4, 128, 4)))
        for bias, gate in ((weight, x), (None, None)):
            convolution._forward._init_fn(x, taps, bias, gate, gate is None)
            convolution._backward._init_fn(x, taps, bias, gate, x, gate is None)
            norm._forward._init_fn(x, weight, bias, 1e-5, bias is not None)
            norm._backward._init_fn(x, weight, x, bias is not None, 1e-5, bias is not None)
        for heads in (64, 128):
            m = products._outer._init_fn(x[None], x[None], heads)
            products._product._init_fn(x[None], products._by_token(m), x[None])


def gated_norm() -> None:
    from based.ops.gated_norm import operator

    # Widths of a recall model, of a language model, and a wide one.
    for heads, head_dim, dtype in ((8, 64, F32), (28, 64, BF16), (80, 64, BF16)):
        C = heads * head_dim
        y, wide = empty(4, 256, C, dtype=dtype), empty(4, 256, 2 * C + 40, dtype=dtype)
        own = empty(4, heads, dtype=F32), empty(4, C, dtype=F32)
        given = y, wide[..., :C], wide[..., C : 2 * C], *own
        operator._forward._init_fn(*given, 1e-5)
        operator._backward._init_fn(*given, y, 1e-5)


def recurrence(K: int, dtype: torch.dtype, decays: int, low_rank: bool, products: str) -> None:
    from based.ops.linear_recurrence import operator

    k, v, g = (empty(2, 256, 2, size, dtype=dtype) for size in (K, 64, decays))
    pair = (k, k) if low_rank else (None, None)
    given, state = (k, k, v, *pair, g.float()), empty(2, 2, K, 64, dtype=F32)
    torch.set_float32_matmul_precision(products)
    out, last, marks = operator._forward._init_fn(*given, state, keep=True)
    operator._backward._init_fn(*given, marks, out, last)


class EightBits:
    """As torchao's quantised weights look to a kernel."""

    def __init__(self, outputs: int, channels: int, kind: torch.dtype) -> None:
        self.qdata, self.scale = empty(outputs, channels, dtype=kind), empty(outputs, 1, dtype=F32)
        self.shape, self.dtype = self.qdata.shape, BF16


def decode() -> None:
    from based.ops.few_rows_linear import decode, tiles
    from based.ops.gated_short_convolution.decode import convolution_step_kernel
    from based.ops.selective_scan.decode import scan_step_kernel
    from based.ops.sliding_window_attention.decode import attention_step_kernel
    from based.ops.taylor_linear_attention.decode import taylor_step_kernel
    from based.ops.token_sampling import Outbox
    from based.ops.token_sampling.decode import sample_tokens_kernel

    H, V = 16, 112
    for rows in (1, 128):
        seen, heads = empty(rows, dtype=torch.int64), empty(rows, H, V)
        for K, F in ((16, 153), (32, 561)):
            q, state = empty(rows, H, K), empty(rows, H, F, V, dtype=F32)
            norm = empty(rows, H, F, dtype=F32)
            ring = empty(rows, 16, H, K), empty(rows, 16, H, V), seen
            halves = empty(rows, H, 2, F, V, dtype=torch.int16)
            taylor_step_kernel(q, q, heads, halves, norm, *ring)
            taylor_step_kernel(q, q, heads, state, norm, *ring)
            taylor_step_kernel(q, q, heads, state, norm)
        for slots in (129, 4096):
            cache, turns = empty(rows, slots, H, V), empty(56, dtype=torch.float64)
            attention_step_kernel(heads, heads, heads, cache, cache, seen, turns)
        for group, dtype in ((4, BF16), (4, F32)):
            cache, q = empty(rows, slots, H, V, dtype=dtype), empty(rows, group * H, V)
            attention_step_kernel(q, heads, heads, cache, cache, seen, turns)
        options = (empty(rows, dtype=F32), seen, empty(rows, dtype=F32), seen, seen, seen)
        sampled = empty(rows, 50264), *options, empty(rows, dtype=torch.float64)
        sample_tokens_kernel(*sampled)
        sample_tokens_kernel(*sampled, Outbox(rows, torch.device("cpu")))
        sample_tokens_kernel(*sampled, peaks=empty(rows, 393, 4, dtype=F32))
        x = empty(rows, 3584)
        convolution_step_kernel(x, x, empty(3584, 3), empty(rows, 2, 3584))
        step, scale = empty(3584, 16, dtype=F32), empty(3584, dtype=F32)
        mixed = x, x, scale, step, empty(rows, 16), empty(rows, 16), scale, x
        scan_step_kernel(*mixed, empty(rows, 3584, 16, dtype=F32))
    for rows in (1, 4):
        norm = empty(rows, 1792, dtype=F32), empty(rows, 1792), empty(1792), 1e-5
        decode.linear_kernel(*norm, weights=[empty(7168, 1792)], swiglu=True)
        gated = {"taps": empty(3584, 3), "past": empty(rows, 2, 3584), "bias": empty(7168)}
        decode.linear_kernel(*norm, weights=[empty(7168, 1792)], **gated)
        decode.linear_kernel(*norm, weights=[empty(n, 1792) for n in (256, 256, 1792)])
        counter = empty(rows, dtype=torch.int64)
        decode.linear_kernel(empty(rows, 3584), weights=[empty(1792, 3584)], counter=counter)
    for kind in (torch.int8, *((torch.float8_e4m3fn,) if CAPABILITY >= 89 else ())):
        fc1, out_proj = EightBits(7168, 1792, kind), EightBits(1792, 3584, kind)
        decode.linear_kernel(*norm, weights=[fc1], swiglu=True)
        decode.linear_kernel(*norm, weights=[EightBits(n, 1792, kind) for n in (256, 256, 1792)])
        decode.linear_kernel(empty(4, 3584), weights=[out_proj])
        decode.linear_kernel(empty(1, 3584), weights=[out_proj])
    for rows in (5, 128):
        counter, division = empty(rows, dtype=torch.int64), tiles.divide(1792, 3584)
        assert division is not None
        tiles.parts_kernel(empty(rows, 3584), empty(1792, 3584), None, counter, division)
        x, weight = empty(rows, 1792), empty(7168, 1792)
        gated = empty(7168), empty(3584, 3), empty(rows, 2, 3584)
        tiles.gated_kernel(x, weight, *gated, 64)
        tiles.gated_kernel(x, weight, None, None, None, 32)
        tiles.side_by_side_kernel(x, [empty(n, 1792) for n in (256, 256, 1792)], 32)


GROUPS: dict[str, Callable[[], object]] = {
    "around": around,
    "decode": decode,
    "gated-norm": gated_norm,
    "rows": rows,
    "recurrence": lambda: [
        recurrence(64, F32, 64, True, "high"),
        recurrence(128, BF16, 1, True, "high"),
    ],
    "window": lambda: [window(64, BF16), window(112, BF16), window(128, F32)],
    "taylor-16-64": lambda: taylor(16, 64, BF16),
    "taylor-16-112": lambda: taylor(16, 112, BF16),
    "taylor-32-64": lambda: taylor(32, 64, BF16),
    "taylor-24-112": lambda: taylor(24, 112, BF16),
    "taylor-16-64-float32": lambda: taylor(16, 64, F32),
    "taylor-16-128-float32": lambda: taylor(16, 128, F32),
}

if __name__ == "__main__":
    GROUPS[GROUP]()
    done = set()
    for function, arguments, options in launches:
        made = compiled(function, arguments, options)
        done.add(function.fn.__name__)
        used = made.metadata.shared
        assert used <= room, f"{function.fn.__name__} takes {used} bytes of shared memory"
        assert "cubin" in made.asm
        before_wait, waits, _ = made.asm["ptx"].partition("griddepcontrol.wait")
        assert bool(waits) == options.get("OVERLAP", False), "a kernel that never waits"
        if waits and function.fn.__name__ == "_tile_kernel":
            assert "cp.async" not in before_wait, "a tile's x is read before the kernel waits"
        if waits and function.fn.__name__ == "_taylor_step_kernel" and options.get("STAGES"):
            # Loads of a state are asynchronous; any other but that of `seen` is of a query.
            early = before_wait.count("ld.global")
            assert early == (options["RING"] > 0), f"{early} loads before the kernel waits"
    print(len(launches), "launches of", " ".join(sorted(done)))
