"""Taylor linear attention as torch operators, and which implementation a call takes.

The operators are opaque to `torch.compile`, have fake and autograd formulas, and
run the Triton kernels on CUDA tensors and the chunked PyTorch form on others.
Eager calls on other devices take the chunked form directly.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from based.ops import kernels
from based.ops.fallback import warn_once
from based.ops.lanes import lanes_as_rows
from based.ops.precision import recording, state_dtype
from based.ops.taylor_linear_attention import chunked
from based.ops.taylor_linear_attention.features import num_features

FEATURE_DIMS = (8, 16, 24, 32)
LARGEST_HEAD_DIM = 256


def taylor_linear_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    numerator: Float[Tensor, "N H F V"] | None = None,
    denominator: Float[Tensor, "N H F"] | None = None,
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H F V"], Float[Tensor, "N H F"]]:
    """Outputs in v's dtype and the final state, as `reference.py` defines them.

    The state starts at zero when it is not given. It has one row a sequence:
    N = B, or the number of packed sequences (then B = 1). Accumulation and
    state are float32 (float64 for float64 inputs).
    """
    if not _takes_operator(q, v):
        return chunked.taylor_linear_attention(q, k, v, numerator, denominator, cu_seqlens)
    return _forward(q, k, v, numerator, denominator, cu_seqlens, True)[:3]


@lanes_as_rows
def taylor_linear_attention_outputs(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    cu_seqlens: Int[Tensor, " E"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """What training needs: the outputs from an empty state, and no state after."""
    if not _takes_operator(q, v):
        return chunked.taylor_linear_attention_outputs(q, k, v, cu_seqlens)
    return _forward(q, k, v, None, None, cu_seqlens, False)[0]


def _takes_operator(q: Tensor, v: Tensor) -> bool:
    """Compiled code always does, and it dispatches when it runs."""
    return q.shape[1] > 0 and (torch.compiler.is_compiling() or _takes_kernels(q, v))


def _takes_kernels(q: Tensor, v: Tensor) -> bool:
    # The kernels' own tests call them; the operator's compare its CPU form.
    if not q.is_cuda or not kernels.are_wanted(q):
        return False
    reason = _unsupported_on(q, q.shape[3], v.shape[3])
    if reason is not None:
        warn_once(f"Taylor linear attention takes the slower PyTorch path: {reason}")
    return reason is None


def has_kernels(feature_dim: int, head_dim: int, x: Tensor) -> bool:
    """Whether kernels compute calls in x's dtype where x is, if that is a GPU."""
    return not x.is_cuda or (
        kernels.are_wanted(x) and not _unsupported_on(x, feature_dim, head_dim)
    )


def _unsupported_on(x: Tensor, feature_dim: int, head_dim: int) -> str | None:
    return _unsupported(feature_dim, head_dim, x.dtype, kernels.shared_memory(x.device))


# Kilobytes of shared memory that `key_gradients`, which has most, takes before Hopper: with
# float32 or not, feature_dim over 16 or not, at a head_dim up to each of these.
SHARED_MEMORY = {
    (False, False): {64: 72, 128: 128, 256: 208},
    (False, True): {64: 96, 128: 168, 256: 196},
    (True, False): {64: 86, 128: 158},
    (True, True): {64: 172},
}


def _unsupported(
    feature_dim: int, head_dim: int, dtype: torch.dtype, room: int = kernels.ENOUGH
) -> str | None:
    """Why no kernel takes such a call on a GPU whose blocks have `room` bytes; None if one does."""
    if feature_dim not in FEATURE_DIMS:
        return f"feature_dim {feature_dim} is not one of {FEATURE_DIMS}"
    if head_dim > LARGEST_HEAD_DIM:
        return f"head_dim {head_dim} is over {LARGEST_HEAD_DIM}"
    if dtype == torch.float32 and head_dim > (limit := 128 if feature_dim <= 16 else 64):
        # States would not fit the shared memory: each is split in two, for tf32x3.
        return f"float32 with a head_dim over {limit}, at feature_dim {feature_dim}"
    needs = SHARED_MEMORY[dtype == torch.float32, feature_dim > 16]
    kilobytes = next(needs[size] for size in needs if size >= head_dim)
    if 1024 * kilobytes > room:
        return (
            f"feature_dim {feature_dim} with head_dim {head_dim} in {dtype} takes {kilobytes} KB "
            f"of shared memory, and this GPU has {room // 1024}"
        )
    return None if kernels.INSTALLED else "triton is not installed"


@torch.library.custom_op("based::taylor_linear_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    cu_seqlens: Tensor | None,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, final state, 1 / denominators of the outputs, the four tensors of `States`."""
    if _takes_kernels(q, v):
        from based.ops.taylor_linear_attention.kernels import launch

        *results, states = launch.forward(q, k, v, numerator, denominator, cu_seqlens, want_state)
        return *results, *states  # pyright: ignore[reportReturnType]
    out, *state = chunked.taylor_linear_attention(q, k, v, numerator, denominator, cu_seqlens)
    empty = [q.new_empty(0) for _ in range(5)]
    return out.clone(), *(x.clone() for x in state), *empty  # pyright: ignore[reportReturnType]


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    cu_seqlens: Tensor | None,
    want_state: bool,
) -> tuple[Tensor, ...]:
    B, T, H, K = q.shape
    V, F, wide = v.shape[3], num_features(K), state_dtype(q.dtype)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty(N, H, F, V, dtype=wide), v.new_empty(N, H, F, dtype=wide)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if not _takes_kernels(q, v):
        return out, *final, *(q.new_empty(0) for _ in range(5))
    from based.ops.taylor_linear_attention.kernels import launch

    none = q.new_empty(0, dtype=torch.float32)
    dtype = launch.Shape.of(q, v).dtype
    inverse = q.new_empty(H, B * T, dtype=torch.float32)
    if not (want_state or numerator is not None or T > launch.LENGTH):
        # No output is another's alias.
        empty = none.to(dtype, copy=True), *(none.clone() for _ in range(3))
        return out, none, none.clone(), inverse, *empty
    M, S, _ = launch.counts(q, cu_seqlens)
    states = q.new_empty(M, H, F, V, dtype=dtype), q.new_empty(M, H, F, dtype=torch.float32)
    strips = none, none.clone()
    if numerator is not None or cu_seqlens is not None or S > N:
        strips = q.new_empty(S, H, F, V, dtype=wide), q.new_empty(S, H, F, dtype=wide)
    return out, *final, inverse, *states, *strips


@torch.library.custom_op("based::taylor_linear_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    inverse: Tensor,
    states: list[Tensor],
    d_out: Tensor,
    d_numerator: Tensor | None,
    d_denominator: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state; the last two empty if there was none."""
    if inverse.numel():
        from based.ops.taylor_linear_attention.kernels import launch

        *grads, d_initial, d_normaliser = launch.backward(
            q,
            k,
            v,
            cu_seqlens,
            out,
            inverse,
            launch.States(*states),
            d_out,
            d_numerator,
            d_denominator,
        )
        if numerator is None:
            d_initial, d_normaliser = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
        return *grads, d_initial, d_normaliser  # pyright: ignore[reportReturnType]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    initial: tuple[Tensor | None, Tensor | None] = (None, None)
    if numerator is not None and denominator is not None:
        initial = numerator.detach().requires_grad_(), denominator.detach().requires_grad_()
        leaves += [x for x in initial if x is not None]
    with recording():
        results = chunked.taylor_linear_attention(
            leaves[0], leaves[1], leaves[2], *initial, cu_seqlens
        )
        by_result = zip(results, (d_out, d_numerator, d_denominator), strict=True)
        given = [(result, d) for result, d in by_result if d is not None]
        grads = torch.autograd.grad([result for result, _ in given], leaves, [d for _, d in given])
    empty = [q.new_empty(0) for _ in range(5 - len(leaves))]
    return *(grad.clone() for grad in grads), *empty  # pyright: ignore[reportReturnType]


@_backward.register_fake
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    inverse: Tensor,
    states: list[Tensor],
    d_out: Tensor,
    d_numerator: Tensor | None,
    d_denominator: Tensor | None,
) -> tuple[Tensor, ...]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    initial = [
        q.new_empty(0, dtype=torch.float32 if inverse.numel() else q.dtype) for _ in range(2)
    ]
    if numerator is not None and denominator is not None:
        initial = [torch.empty_like(numerator), torch.empty_like(denominator)]
    return *grads, *initial


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, numerator, denominator, cu_seqlens, _ = inputs
    out, _, _, inverse, *states = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, numerator, denominator, cu_seqlens, out, inverse, *states)


def _gradients(ctx, d_out, d_numerator, d_denominator, *_) -> tuple[Tensor | None, ...]:
    q, k, v, numerator, denominator, cu_seqlens, out, inverse, *states = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    if d_numerator is not None or d_denominator is not None:
        like = state_dtype(q.dtype)
        N = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        shape = (N, q.shape[2], num_features(q.shape[3]))
        if d_numerator is None:
            d_numerator = q.new_zeros((*shape, v.shape[3]), dtype=like)
        if d_denominator is None:
            d_denominator = q.new_zeros(shape, dtype=like)
    *grads, d_initial, d_normaliser = _backward(
        q,
        k,
        v,
        numerator,
        denominator,
        cu_seqlens,
        out,
        inverse,
        states,
        d_out,
        d_numerator,
        d_denominator,
    )
    initial = (None, None) if numerator is None else (d_initial, d_normaliser)
    return *grads, *initial, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
