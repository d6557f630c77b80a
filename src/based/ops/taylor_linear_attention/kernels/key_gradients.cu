// d_k and d_v on Hopper: what kernels/gradients.py's key_gradients computes, at feature_dim 16. The
// state here is the gradient of the state after the segment. Two passes, one for each result.

// Blocks of queries beyond the keys' own tile.
__device__ __forceinline__ int later_blocks(int length, int tile) {
    return max(0, (length - (tile + 1) * TILE + KEYS - 1) / KEYS);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) key_gradients(
    const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v,
    const u16* __restrict__ g_in, const float* __restrict__ delta,
    u16* __restrict__ d_k, u16* __restrict__ d_v, const int* __restrict__ segments,
    const u16* __restrict__ numerator, const float* __restrict__ normaliser,
    const u16* __restrict__ strip_numerator, const float* __restrict__ strip_normaliser,
    i64 q_stride_t, i64 q_stride_h, i64 k_stride_t, i64 k_stride_h, i64 v_stride_t, i64 v_stride_h,
    i64 T, i64 H, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = address(memory);
    const int thread = threadIdx.x, lane = thread & 31;
    const int half = __shfl_sync(~0u, thread >> 7, 0), warp = __shfl_sync(~0u, thread >> 5 & 3, 0);
    const int g = lane >> 2, t = lane & 3;
    const Segment at = segment_of(segments, H, true);
    const i64 begin = at.begin;
    const int head = at.head, length = at.length;
    if (length <= 0) return;

    q += begin * q_stride_t + head * q_stride_h;
    k += begin * k_stride_t + head * k_stride_h;
    v += begin * v_stride_t + head * v_stride_h;
    g_in += (begin * H + head) * V;
    d_v += (begin * H + head) * V;
    d_k += (begin * H + head) * 16;
    delta += head * T + begin;
    State state = state_of(at, numerator, normaliser, strip_numerator, strip_normaliser);

    const u32 touched = thread < length ? touch(k + thread * k_stride_t) : 0;
    if (thread < length) prefetch<V>(v + thread * v_stride_t);
    float2_ terms = {0, 0};
    if (state.exists) {
        if (!STRIPS) load_state(shared, state, thread);
        terms = read_terms<false>(state, thread);
    }
    load_rest(shared, state, touched, terms, q, q_stride_t, g_in, H * V, length, thread);
    await_copies<1>();
    __syncthreads();

#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        const int tile = turn == 0 ? half : 3 - half;
        const int row = tile * TILE + warp * 16 + g;
        const bool any = tile * TILE < length;
        float acc[V / 2], nothing[2];
#pragma unroll
        for (int i = 0; i < V / 2; i++) acc[i] = 0;
        u32 own[4];
        if (any) {
            u32 x[2][8];
            load_own(x, own, k, k_stride_t, row, length, t);
            if (state.exists) read_state<false>(acc, x, shared, t);
        }
        if (turn == 0) {
            await_copies<0>();
            __syncthreads();
        }
        if (!any) continue;
        add_pairs<true>(acc, nothing, own, shared, tile, later_blocks(length, tile), warp, g, t, scale);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 2 * r; i < V / 2; i += 8)
                store_words(d_v + (i64)(row + 8 * r) * H * V + i / 4 * 8, pack(acc[i], acc[i + 1]),
                    pack(acc[i + 4], acc[i + 5]), t, row + 8 * r < length);
    }

    // What the second pass addresses is not computed before: it would be kept all through the first.
    renew(v), renew(k), renew(d_k), renew(delta), renew(state.normaliser), renew(state.before_normaliser);
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        const int tile = turn == 0 ? half : 3 - half;
        const int row = tile * TILE + warp * 16 + g;
        if (tile * TILE >= length) break;
        float d_x[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        u32 own[4];
        Left y;
        u32 words[2][V / 16][2];
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int part = 0; part < V / 16; part++)
                load_words(words[r][part], v + (row + 8 * r) * v_stride_t + part * 16, t, row + 8 * r < length);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int part = 0; part < V / 16; part++) {
                exchange_words(words[r][part], t);
                y[part][r] = words[r][part][0], y[part][r + 2] = words[r][part][1];
            }
        {
            u32 x[2][8];
            load_own(x, own, k, k_stride_t, row, length, t);
            if (state.exists) {
                state_gradient<false>(d_x, x, own, y, shared, t);
                float mixed[2][4];
                times_terms(mixed, own, shared, lane);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        d_x[r][i] += mixed[r][i] + linear_of(state, t, i);
            }
        }
        const float none[2] = {0, 0};
        float pairs[8];
        as_product(pairs, d_x);
        pair_gradient<true>(pairs, own, y, none, delta, length, shared, tile, later_blocks(length, tile), warp, g, t, scale);
        store_product(d_k, H, pairs, row, length, t);
    }
}
