"""A program carries columns of one head's state through the sequence, a chunk of tokens at a time.

With G_t the sum of the chunk's log decays up to t, E_t that before t, and u_t = a_t^T S_(t-1):

    u = (I - P_ab)^-1 ((a e^E) S_0 + P_ak v)        P_xy = x_t . (y_i e^(E_t - G_i)), i < t
    o = (q e^G) S_0 + P_qk v + P_qb u               P_xy = x_t . (y_i e^(G_t - G_i)), i <= t
    S = e^G_last (S_0 + (k e^-G)^T v + (b e^-G)^T u)

The state before each chunk is kept; the backward pass goes from the last chunk to
the first and computes the rest anew. The gradient of a log decay needs no products of
its own: G_t stands beside q_t (and k_t, b_t, negative), so its gradient is q_t dq_t -
k_t dk_t - b_t db_t, and E_t's a_t da_t, summed over channels where they share a decay.
"""

import triton
import triton.language as tl

from based.ops.tensor_core import dot, dot_add


@triton.jit
def forward(
    q, k, v, a, b, g, state, out, last, marks,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c,
    a_b, a_t, a_h, a_c, b_b, b_t, b_h, b_c, g_b, g_t, g_h, g_c,
    T, H, K, V,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    A_CHANNEL: tl.constexpr, LOW_RANK: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Outputs, final state and marks of one head's BLOCK_V columns. Grid: heads of rows, blocks."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    key = tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    cell = key[:, None] * V + column[None, :]
    inside = (key[:, None] < K) & (column[None, :] < V)
    S = tl.load(state + row * K * V + cell, inside, 0.0)
    chunks = tl.cdiv(T, CHUNK)
    marks += row * (chunks + 1) * K * V
    for chunk in range(chunks):
        if KEEP:
            tl.store(marks + chunk * K * V + cell, S, inside)
        t = chunk * CHUNK + tl.arange(0, CHUNK)
        x_q = _tile(q + batch * q_b + head * q_h, t, key, q_t, q_c, T, K)
        x_k = _tile(k + batch * k_b + head * k_h, t, key, k_t, k_c, T, K)
        x_v = _tile(v + batch * v_b + head * v_h, t, column, v_t, v_c, T, V)
        x_g = _decays(g + batch * g_b + head * g_h, t, key, g_t, g_c, T, K, A_CHANNEL)
        G, end = _running(x_g, False, A_CHANNEL), tl.sum(x_g, 0)[None, :]
        from_start, to_end = tl.exp(G), tl.exp(_running(x_g, True, A_CHANNEL) - x_g)
        x_a, x_b = x_q, x_k
        if LOW_RANK:
            x_a = _tile(a + batch * a_b + head * a_h, t, key, a_t, a_c, T, K)
            x_b = _tile(b + batch * b_b + head * b_h, t, key, b_t, b_c, T, K)
        P_qk, P_qb, P_ak, P_ab = _scores(
            x_q, x_k, x_a, x_b, x_g, G, CHUNK, LEVELS, LOW_RANK, A_CHANNEL, PRECISION
        )
        o = dot(P_qk, x_v, PRECISION)
        if LOW_RANK:
            u = dot_add(P_ak, x_v, dot(x_a * tl.exp(G - x_g), S, PRECISION), PRECISION)
            u = dot(_inverse(P_ab, CHUNK, LEVELS), u, "tf32x3")
            o = dot_add(P_qb, u, o, PRECISION)
        o = dot_add(x_q * from_start, S, o, PRECISION)
        S = _column(tl.exp(end), A_CHANNEL) * S
        S = dot_add(tl.trans(x_k * to_end), x_v, S, PRECISION)
        if LOW_RANK:
            S = dot_add(tl.trans(x_b * to_end), u, S, PRECISION)
        at = ((batch * T + t[:, None]) * H + head) * V + column[None, :]
        kept = (t[:, None] < T) & (column[None, :] < V)
        tl.store(out + at, o.to(out.dtype.element_ty), kept)
    if KEEP:
        tl.store(marks + chunks * K * V + cell, S, inside)
    tl.store(last + row * K * V + cell, S, inside)


@triton.jit
def backward(
    q, k, v, a, b, g, marks, d_out, d_last, dq, dk, da, db, dg, dv, d_state,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c,
    a_b, a_t, a_h, a_c, b_b, b_t, b_h, b_c, g_b, g_t, g_h, g_c,
    T, H, K, V,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    A_CHANNEL: tl.constexpr, LOW_RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients, of what all columns share a part from each block. The grid is `forward`'s."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    key = tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    cell = key[:, None] * V + column[None, :]
    inside = (key[:, None] < K) & (column[None, :] < V)
    dS = tl.load(d_last + row * K * V + cell, inside, 0.0)
    chunks = tl.cdiv(T, CHUNK)
    marks += row * (chunks + 1) * K * V
    # Where this block of columns leaves its part of the gradients of keys.
    part = tl.program_id(1) * (tl.num_programs(0) // H) + batch
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * CHUNK + tl.arange(0, CHUNK)
        x_q = _tile(q + batch * q_b + head * q_h, t, key, q_t, q_c, T, K)
        x_k = _tile(k + batch * k_b + head * k_h, t, key, k_t, k_c, T, K)
        x_v = _tile(v + batch * v_b + head * v_h, t, column, v_t, v_c, T, V)
        x_g = _decays(g + batch * g_b + head * g_h, t, key, g_t, g_c, T, K, A_CHANNEL)
        G, end = _running(x_g, False, A_CHANNEL), tl.sum(x_g, 0)[None, :]
        from_start, to_end = tl.exp(G), tl.exp(_running(x_g, True, A_CHANNEL) - x_g)
        at = ((batch * T + t[:, None]) * H + head) * V + column[None, :]
        kept = (t[:, None] < T) & (column[None, :] < V)
        d_o = tl.load(d_out + at, kept, 0.0).to(tl.float32)
        S = tl.load(marks + (chunk + 1) * K * V + cell, inside, 0.0)
        to_end_sum = tl.sum(S * dS, 1)
        S = tl.load(marks + chunk * K * V + cell, inside, 0.0)
        x_a, x_b = x_q, x_k
        if LOW_RANK:
            x_a = _tile(a + batch * a_b + head * a_h, t, key, a_t, a_c, T, K)
            x_b = _tile(b + batch * b_b + head * b_h, t, key, b_t, b_c, T, K)
        P_qk, P_qb, P_ak, P_ab = _scores(
            x_q, x_k, x_a, x_b, x_g, G, CHUNK, LEVELS, LOW_RANK, A_CHANNEL, PRECISION
        )
        d_v = dot_add(tl.trans(P_qk), d_o, dot(x_k * to_end, dS, PRECISION), PRECISION)
        d_q = dot(d_o, tl.trans(S), PRECISION) * from_start
        d_k = dot(x_v, tl.trans(dS), PRECISION)
        before = dot(tl.trans(x_q * from_start), d_o, PRECISION)
        to_qk = dot(d_o, tl.trans(x_v), PRECISION)
        to_qb, to_ak, to_ab, d_a, d_b = to_qk, to_qk, to_qk, d_q, d_k
        if LOW_RANK:
            inverse, to_start = _inverse(P_ab, CHUNK, LEVELS), tl.exp(G - x_g)
            u = dot_add(P_ak, x_v, dot(x_a * to_start, S, PRECISION), PRECISION)
            u = dot(inverse, u, "tf32x3")
            d_u = dot_add(tl.trans(P_qb), d_o, dot(x_b * to_end, dS, PRECISION), PRECISION)
            d_u = dot(tl.trans(inverse), d_u, "tf32x3")
            d_v = dot_add(tl.trans(P_ak), d_u, d_v, PRECISION)
            before = dot_add(tl.trans(x_a * to_start), d_u, before, PRECISION)
            d_a = dot(d_u, tl.trans(S), PRECISION) * to_start
            d_b = dot(u, tl.trans(dS), PRECISION) * to_end
            to_ak, to_ab = dot(d_u, tl.trans(x_v), PRECISION), dot(d_u, tl.trans(u), PRECISION)
            to_qb = dot(d_o, tl.trans(u), PRECISION)
        d_k *= to_end
        d_q, d_k, d_a, d_b = _through(
            (to_qk, to_qb, to_ak, to_ab), x_q, x_k, x_a, x_b, x_g, G, d_q, d_k, d_a, d_b,
            CHUNK, LEVELS, LOW_RANK, A_CHANNEL, PRECISION,
        )  # fmt: skip
        dS = _column(tl.exp(end), A_CHANNEL) * dS + before
        wide = ((part * T + t[:, None]) * H + head) * K + key[None, :]
        narrow = (t[:, None] < T) & (key[None, :] < K)
        tl.store(dv + at, d_v.to(dv.dtype.element_ty), kept)
        tl.store(dq + wide, d_q, narrow)
        tl.store(dk + wide, d_k, narrow)
        to_G = x_q * d_q - x_k * d_k
        if LOW_RANK:
            tl.store(da + wide, d_a, narrow)
            tl.store(db + wide, d_b, narrow)
            to_G -= x_b * d_b
            to_E = x_a * d_a
        else:
            to_E = tl.zeros_like(to_G)
        if A_CHANNEL:
            d_g = tl.cumsum(to_G + to_E, 0, reverse=True) - to_E + to_end_sum[None, :]
            tl.store(dg + wide, d_g, narrow)
        else:
            both, later = tl.sum(to_G + to_E, 1), tl.sum(to_E, 1)
            d_g = tl.cumsum(both, 0, reverse=True) - later + tl.sum(to_end_sum, 0)
            tl.store(dg + (part * T + t) * H + head, d_g, t < T)
    tl.store(d_state + row * K * V + cell, dS, inside)


@triton.jit
def _tile(x, t, channel, T_STRIDE, C_STRIDE, T, C):
    """Rows t of one head, float32; zeros outside."""
    at = x + t[:, None].to(tl.int64) * T_STRIDE + channel[None, :] * C_STRIDE
    return tl.load(at, (t[:, None] < T) & (channel[None, :] < C), 0.0).to(tl.float32)


@triton.jit
def _decays(g, t, channel, T_STRIDE, C_STRIDE, T, C, A_CHANNEL: tl.constexpr):
    """Log decays of the chunk, [L, K], or [L, 1] where channels share one."""
    if A_CHANNEL:
        x = _tile(g, t, channel, T_STRIDE, C_STRIDE, T, C)
    else:
        x = tl.load(g + t.to(tl.int64) * T_STRIDE, t < T, 0.0).to(tl.float32)[:, None]
    return x


@triton.jit
def _running(x, REVERSE: tl.constexpr, A_CHANNEL: tl.constexpr):
    """Sums up to each token, or from it on."""
    if A_CHANNEL:
        y = tl.cumsum(x, 0, reverse=REVERSE)
    else:
        # Triton 3.6 cannot scan a tensor of one column.
        y = tl.cumsum(tl.reshape(x, (x.shape[0],)), 0, reverse=REVERSE)[:, None]
    return y


@triton.jit
def _column(x, A_CHANNEL: tl.constexpr):
    """[1, K] as [K, 1]."""
    return tl.trans(x) if A_CHANNEL else x


@triton.jit
def _scores(
    q, k, a, b, g, G, CHUNK: tl.constexpr, LEVELS: tl.constexpr, LOW_RANK: tl.constexpr,
    A_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P_qk, P_qb, P_ak and P_ab; without LOW_RANK P_qk alone, four times.

    Level by level, all four at once: the decays of a level are then soon forgotten.
    """
    late, early = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    if not A_CHANNEL:
        weights = _weights(g, late, early, True)
        P_qk = dot(q, tl.trans(k), PRECISION) * weights
        P_qb, P_ak, P_ab = P_qk, P_qk, P_qk
        if LOW_RANK:
            P_qb = dot(q, tl.trans(b), PRECISION) * weights
            weights = _weights(g, late, early, False)
            P_ak = dot(a, tl.trans(k), PRECISION) * weights
            P_ab = dot(a, tl.trans(b), PRECISION) * weights
    else:
        P_qk = tl.where(early == late, tl.sum(q * k, 1)[:, None], 0.0)
        P_qb, P_ak, P_ab = P_qk, P_qk, P_qk
        if LOW_RANK:
            P_qb = tl.where(early == late, tl.sum(q * b, 1)[:, None], 0.0)
            P_ak = tl.zeros((CHUNK, CHUNK), tl.float32)
            P_ab = tl.zeros((CHUNK, CHUNK), tl.float32)
        for level in tl.static_range(LEVELS):
            pairs = _pairs(late, early, 1 << level)
            from_border, to_border = _around_border(G, G, 1 << level, CHUNK)
            k_there, q_there = tl.trans(k * to_border), q * from_border
            P_qk = tl.where(pairs, dot(q_there, k_there, PRECISION), P_qk)
            if LOW_RANK:
                from_border, to_border = _around_border(G - g, G, 1 << level, CHUNK)
                b_there, a_there = tl.trans(b * to_border), a * from_border
                P_qb = tl.where(pairs, dot(q_there, b_there, PRECISION), P_qb)
                P_ak = tl.where(pairs, dot(a_there, k_there, PRECISION), P_ak)
                P_ab = tl.where(pairs, dot(a_there, b_there, PRECISION), P_ab)
    return P_qk, P_qb, P_ak, P_ab


@triton.jit
def _through(
    dP, q, k, a, b, g, G, dq, dk, da, db,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, LOW_RANK: tl.constexpr,
    A_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db with what reaches them through the scores, whose gradients dP holds."""
    to_qk, to_qb, to_ak, to_ab = dP
    late, early = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    if not A_CHANNEL:
        weights = _weights(g, late, early, True)
        to_qk *= weights
        dq = dot_add(to_qk, k, dq, PRECISION)
        dk = dot_add(tl.trans(to_qk), q, dk, PRECISION)
        if LOW_RANK:
            to_qb *= weights
            dq = dot_add(to_qb, b, dq, PRECISION)
            db = dot_add(tl.trans(to_qb), q, db, PRECISION)
            weights = _weights(g, late, early, False)
            to_ak *= weights
            to_ab *= weights
            da = dot_add(to_ab, b, dot_add(to_ak, k, da, PRECISION), PRECISION)
            dk = dot_add(tl.trans(to_ak), a, dk, PRECISION)
            db = dot_add(tl.trans(to_ab), a, db, PRECISION)
    else:
        own = tl.sum(tl.where(early == late, to_qk, 0.0), 1)[:, None]
        dq += own * k
        dk += own * q
        if LOW_RANK:
            own = tl.sum(tl.where(early == late, to_qb, 0.0), 1)[:, None]
            dq += own * b
            db += own * q
        for level in tl.static_range(LEVELS):
            pairs = _pairs(late, early, 1 << level)
            from_border, to_border = _around_border(G, G, 1 << level, CHUNK)
            k_there, q_there = k * to_border, q * from_border
            own_qk = tl.where(pairs, to_qk, 0.0)
            reaches_q = dot(own_qk, k_there, PRECISION)
            reaches_k = dot(tl.trans(own_qk), q_there, PRECISION)
            if LOW_RANK:
                from_before, to_border = _around_border(G - g, G, 1 << level, CHUNK)
                b_there, a_there = b * to_border, a * from_before
                own_qb = tl.where(pairs, to_qb, 0.0)
                own_ak = tl.where(pairs, to_ak, 0.0)
                own_ab = tl.where(pairs, to_ab, 0.0)
                reaches_q = dot_add(own_qb, b_there, reaches_q, PRECISION)
                reaches_k = dot_add(tl.trans(own_ak), a_there, reaches_k, PRECISION)
                reaches_b = dot(tl.trans(own_qb), q_there, PRECISION)
                reaches_b = dot_add(tl.trans(own_ab), a_there, reaches_b, PRECISION)
                reaches_a = dot(own_ak, k_there, PRECISION)
                reaches_a = dot_add(own_ab, b_there, reaches_a, PRECISION)
                da += from_before * reaches_a
                db += to_border * reaches_b
            dq += from_border * reaches_q
            dk += to_border * reaches_k
    return dq, dk, da, db


@triton.jit
def _weights(g, late, early, SELF: tl.constexpr):
    """e^(G_t - G_i), or to E_t: each exponent a sum of its own, for long sums cancel."""
    sums = tl.cumsum(
        tl.where(early < late, tl.broadcast_to(g, late.shape[0], early.shape[1]), 0.0), 0
    )
    if SELF:
        return tl.where(early <= late, tl.exp(sums), 0.0)
    return tl.where(early < late, tl.exp(tl.minimum(sums - g, 0.0)), 0.0)


@triton.jit
def _pairs(late, early, HALF: tl.constexpr):
    """Whether late is in the second half of a block and early in the first half of the same."""
    same = late // (2 * HALF) == early // (2 * HALF)
    return same & (late % (2 * HALF) >= HALF) & (early % (2 * HALF) < HALF)


@triton.jit
def _around_border(X, G, HALF: tl.constexpr, CHUNK: tl.constexpr):
    """Decays from the middle of each token's block to it, and from it to there.

    A decay a channel does not factor out of a product of two tokens, and e^G_t e^-G_i
    overflows. At a border between them it factors with both exponents negative; where
    one would be positive no pair asks for it, and 1 stands there.
    """
    token = tl.arange(0, CHUNK)[:, None]
    border = token // (2 * HALF) * (2 * HALF) + HALF - 1
    at_border = tl.gather(G, tl.broadcast_to(border, G.shape), 0)
    return tl.exp(tl.minimum(X - at_border, 0.0)), tl.exp(tl.minimum(at_border - G, 0.0))


@triton.jit
def _inverse(P, CHUNK: tl.constexpr, LEVELS: tl.constexpr):
    """(I - P)^-1 of a strictly lower P: the product of I + P^(2^j)."""
    one = tl.arange(0, CHUNK)
    power = P
    total = tl.where(one[:, None] == one[None, :], 1.0, P)
    for _ in tl.static_range(LEVELS - 1):
        power = dot(power, power, "tf32x3")
        total = dot_add(total, power, total, "tf32x3")
    return total
