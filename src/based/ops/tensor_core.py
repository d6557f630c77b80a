"""Matrix products inside Triton kernels, the same compiled and interpreted."""

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 as if it were integers: there, operands that
# are already rounded are widened first, which is what the hardware computes.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def opaque(x):
    """x, a 32-bit scalar, as a value made here: what hangs on it is not computed before a loop.

    Addresses of a large tile are many registers, and the loop needs them for itself.
    """
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)
