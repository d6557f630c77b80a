// d_q, g and delta on Hopper: what kernels/gradients.py's query_gradients computes, at feature_dim 16.

extern "C" __global__ void __launch_bounds__(THREADS, 2) query_gradients(
    const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v,
    const u16* __restrict__ out, const u16* __restrict__ d_out, const float* __restrict__ inverse,
    u16* __restrict__ g_out, float* __restrict__ delta_out, u16* __restrict__ d_q, const int* __restrict__ segments,
    const u16* __restrict__ numerator, const float* __restrict__ normaliser,
    const u16* __restrict__ strip_numerator, const float* __restrict__ strip_normaliser,
    i64 q_stride_t, i64 q_stride_h, i64 k_stride_t, i64 k_stride_h, i64 v_stride_t, i64 v_stride_h,
    i64 d_stride_t, i64 d_stride_h, i64 T, i64 H, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = address(memory);
    const int thread = threadIdx.x, lane = thread & 31;
    const int half = __shfl_sync(~0u, thread >> 7, 0), warp = __shfl_sync(~0u, thread >> 5 & 3, 0);
    const int g = lane >> 2, t = lane & 3;
    const Segment at = segment_of(segments, H, false);
    const i64 begin = at.begin;
    const int head = at.head, length = at.length;
    if (length <= 0) return;

    q += begin * q_stride_t + head * q_stride_h;
    k += begin * k_stride_t + head * k_stride_h;
    v += begin * v_stride_t + head * v_stride_h;
    d_out += begin * d_stride_t + head * d_stride_h;
    out += (begin * H + head) * V;
    g_out += (begin * H + head) * V;
    d_q += (begin * H + head) * 16;
    inverse += head * T + begin;
    delta_out += head * T + begin;
    const State state = state_of(at, numerator, normaliser, strip_numerator, strip_normaliser);

    const u32 touched = thread < length ? touch(q + thread * q_stride_t) : 0;
    // The second turn's rows, which come from memory otherwise when they are needed.
    const int second = 128 + (thread & 127);
    if (second < length) prefetch<V>(thread < 128 ? d_out + second * d_stride_t : out + second * H * V);
    float2_ terms = {0, 0};
    if (state.exists) {
        if (!STRIPS) load_state(shared, state, thread);
        terms = read_terms<true>(state, thread);
    }
    load_rest(shared, state, touched, terms, k, k_stride_t, v, v_stride_t, length, thread);

#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        const int tile = turn == 0 ? half : 3 - half;
        const int first = tile * TILE, row = first + warp * 16 + g;
        const bool any = first < length;
        Left y;
        float delta[2];
        // All rows are asked for before the first is used.
        u32 d[2][V / 16][2], o[2][V / 16][2];
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int part = 0; part < V / 16; part++) {
                const bool real = row + 8 * r < length;
                load_words(d[r][part], d_out + (row + 8 * r) * d_stride_t + part * 16, t, real);
                load_words(o[r][part], out + (i64)(row + 8 * r) * H * V + part * 16, t, real);
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const bool real = row + 8 * r < length;
            const float one_over = real ? inverse[row + 8 * r] : 0;
            float sum = 0;
#pragma unroll
            for (int part = 0; part < V / 16; part++) {
                exchange_words(d[r][part], t);
                exchange_words(o[r][part], t);
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const u32 two = d[r][part][side], outs = o[r][part][side];
                    const u32 word = pack(low(two) * one_over, high(two) * one_over);
                    // Of g as it was rounded: what v has in common cancels in g . (v - out).
                    sum += low(word) * low(outs) + high(word) * high(outs);
                    y[part][r + 2 * side] = word;
                }
                store_words(g_out + (i64)(row + 8 * r) * H * V + part * 16, y[part][r], y[part][r + 2], t, real);
            }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            delta[r] = -sum;
            if (real && t == 0) delta_out[row + 8 * r] = -sum;
        }
        if (turn == 0) {
            await_copies<0>();
            __syncthreads();
        }
        if (!any) continue;
        float d_x[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        u32 own[4];
        {
            u32 x[2][8];
            load_own(x, own, q, q_stride_t, row, length, t);
            if (state.exists) {
                state_gradient<true>(d_x, x, own, y, shared, t);
                float mixed[2][4];
                times_terms(mixed, own, shared, lane);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float linear = linear_of(state, t, i);
                        d_x[r][i] = d_x[r][i] * (1.0f / 16) + delta[r] * (mixed[r][i] + scale * linear);
                    }
            }
        }
        float pairs[8];
        as_product(pairs, d_x);
        pair_gradient<false>(pairs, own, y, delta, nullptr, length, shared, tile, tile * (TILE / KEYS), warp, g, t, scale);
        store_product(d_q, H, pairs, row, length, t);
    }
}
