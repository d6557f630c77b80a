// Outputs of Taylor linear attention on Hopper: what kernels/outputs.py computes, at feature_dim 16.

extern "C" __global__ void __launch_bounds__(THREADS, 2) attend(
    const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v,
    u16* __restrict__ out, float* __restrict__ inverse, const int* __restrict__ segments,
    const u16* __restrict__ numerator, const float* __restrict__ normaliser,
    const u16* __restrict__ strip_numerator, const float* __restrict__ strip_normaliser,
    i64 q_stride_t, i64 q_stride_h, i64 k_stride_t, i64 k_stride_h, i64 v_stride_t, i64 v_stride_h,
    i64 T, i64 H, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = address(memory);
    const int thread = threadIdx.x, lane = thread & 31;
    // Known to be uniform, so that wgmma may be in flight.
    const int half = __shfl_sync(~0u, thread >> 7, 0), warp = __shfl_sync(~0u, thread >> 5 & 3, 0);
    const int g = lane >> 2, t = lane & 3;
    const Segment at = segment_of(segments, H, false);
    const i64 begin = at.begin;
    const int head = at.head, length = at.length;
    if (length <= 0) return;

    q += begin * q_stride_t + head * q_stride_h;
    k += begin * k_stride_t + head * k_stride_h;
    v += begin * v_stride_t + head * v_stride_h;
    out += (begin * H + head) * V;
    inverse += head * T + begin;
    const State state = state_of(at, numerator, normaliser, strip_numerator, strip_normaliser);

    // Rows of q into the first cache: 32 bytes each, read when keys and values queue for memory.
    const u32 touched = thread < length ? touch(q + thread * q_stride_t) : 0;
    // The state next, where it is only copied; keys and values come while it is used.
    float constant = 0, vector[4] = {0, 0, 0, 0};
    float2_ terms = {0, 0};
    if (state.exists) {
        if (!STRIPS) load_state(shared, state, thread);
        terms = read_terms<true>(state, thread);
        constant = sum_of(state, 0);
#pragma unroll
        for (int i = 0; i < 4; i++)
            vector[i] = scale * sum_of(state, 1 + 2 * t + (i & 1) + (i >> 1) * 8);
    }
    load_rest(shared, state, touched, terms, k, k_stride_t, v, v_stride_t, length, thread);
    await_copies<1>();
    __syncthreads();

#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        const int tile = turn == 0 ? half : 3 - half;
        const int first = tile * TILE, row = first + warp * 16 + g;
        const bool any = first < length;
        float acc[V / 2], below[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < V / 2; i++) acc[i] = 0;
        u32 own[4];  // q as the left side of a product
        if (any) {
            u32 x[2][8];
            load_own(x, own, q, q_stride_t, row, length, t);
            if (state.exists) {
                read_state<true>(acc, x, shared, t);
                float mixed[2][4];
                times_terms(mixed, own, shared, lane);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int i = 0; i < 4; i++) below[r] += value_of(own, r, i) * (0.5f * mixed[r][i] + vector[i]);
            }
        }
        if (turn == 0) {
            await_copies<0>();
            __syncthreads();
        }
        if (!any) continue;
        add_pairs<false>(acc, below, own, shared, tile, tile * (TILE / KEYS), warp, g, t, scale);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = below[r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float one_over = 1 / (sum + constant);
            const bool real = row + 8 * r < length;
            if (real && t == 0) inverse[row + 8 * r] = one_over;
            u16* target = out + (i64)(row + 8 * r) * H * V;
#pragma unroll
            for (int i = 2 * r; i < V / 2; i += 8)
                store_words(target + i / 4 * 8, pack(acc[i] * one_over, acc[i + 1] * one_over),
                    pack(acc[i + 4] * one_over, acc[i + 5] * one_over), t, real);
        }
    }
}
