"""Both products for a block of tokens and channels of one row; matrices in any layout.

A program turns its block around on chip: vectors lie by token, matrices by head. Its
columns are the channels j, so that it reads or writes whole stretches of a vector.
"""

import triton
import triton.language as tl


@triton.jit
def outer_product(
    a, b, m, a_l, a_b, a_t, a_c, b_l, b_b, b_t, b_c, m_l, m_b, m_t, m_h, m_i, m_j, B, T, C,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: rows of all lanes, blocks of tokens, blocks of channels."""
    lane, row, t, c, inside = _place(B, T, C, BLOCK_T, BLOCK_C)
    h, j = c // D, c % D
    a += lane * a_l + row * a_b + t[:, None] * a_t + (h * D * a_c)[None, :]
    b += lane * b_l + row * b_b + t[:, None] * b_t + (c * b_c)[None, :]
    m += lane * m_l + row * m_b + t[:, None] * m_t + (h * m_h + j * m_j)[None, :]
    right = tl.load(b, inside, 0.0).to(tl.float32)
    for i in tl.static_range(D):
        left = tl.load(a + i * a_c, inside, 0.0).to(tl.float32)
        tl.store(m + i * m_i, (left * right).to(m.dtype.element_ty), inside)


@triton.jit
def vector_matrix_product(
    a, m, y, a_l, a_b, a_t, a_c, m_l, m_b, m_t, m_h, m_i, m_j, y_l, y_b, y_t, y_c, B, T, C,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`outer_product`'s grid."""
    lane, row, t, c, inside = _place(B, T, C, BLOCK_T, BLOCK_C)
    h, j = c // D, c % D
    a += lane * a_l + row * a_b + t[:, None] * a_t + (h * D * a_c)[None, :]
    m += lane * m_l + row * m_b + t[:, None] * m_t + (h * m_h + j * m_j)[None, :]
    y += lane * y_l + row * y_b + t[:, None] * y_t + (c * y_c)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i in tl.static_range(D):
        left = tl.load(a + i * a_c, inside, 0.0).to(tl.float32)
        total += left * tl.load(m + i * m_i, inside, 0.0).to(tl.float32)
    tl.store(y, total.to(y.dtype.element_ty), inside)


@triton.jit
def _place(B, T, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Lane and row, tokens and channels of this program, and which of them exist."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    return row // B, row % B, t, c, (t[:, None] < T) & (c[None, :] < C)
