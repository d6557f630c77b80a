// Gradients of q and k on Hopper, at feature_dim 16: what both kernels' passes share.
//
// Here the left side of products, y, is g (for q) or v (for k), 64 rows in registers. Products of
// y with rows of a state are the gradients of features; with rows of v (or g), those of weights.

// y's rows as the left side of V / 16 products.
typedef u32 Left[V / 16][4];

// Sixteen values of a row each move to the next column; the last becomes the first.
__device__ __forceinline__ void roll(float (&x)[4], int t) {
    const int from = (threadIdx.x & 28) | ((t + 3) & 3);
    const float even = __shfl_sync(~0u, x[1], from), odd = __shfl_sync(~0u, x[3], from);
    x[1] = x[0], x[3] = x[2];
    x[0] = t > 0 ? even : odd, x[2] = t > 0 ? odd : even;
}

// y times 32 rows of a state, 32 * block on: gradients of features.
__device__ __forceinline__ void start_features(float (&d_phi)[16], const Left& y, u32 shared, int block) {
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < V / 16; part++) {
        const u64 rows = descriptor<1>(shared + part / 4 * STATE_PANEL + block * 32 * 128 + part % 4 * 32, 16, 1024);
        if (part == 0) start_32<0>(d_phi, y[part], rows);
        else add_32<0>(d_phi, y[part], rows);
    }
    wgmma_commit();
}

// The gradient of x through its features, of rows g and g + 8 the thread's four columns. Taylor
// weights: queries' are 1/16 for products, all of which is left to the caller.
template <bool QUERIES> __device__ __forceinline__ void state_gradient(
    float (&d_x)[2][4], const u32 (&x)[2][8], const u32 (&own)[4], const Left& y, u32 shared, int t) {
    float rolled[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};  // second factors' gradients, rolled back a step a diagonal
    float d_phi[AHEAD + 1][16];
    if (AHEAD) start_features(d_phi[0], y, shared, 4);
#pragma unroll
    for (int step = 0; step < 5; step++) {
        float (&now)[16] = d_phi[AHEAD ? step & 1 : 0];
        if (!AHEAD) start_features(now, y, shared, 4 - step);
        if (AHEAD && step < 4) {
            start_features(d_phi[1 - (step & 1)], y, shared, 3 - step);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        settle(now);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // now[4 j + 2 r + n]: row r, column 8 j + 2 t + n.
            if (step == 0) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const float half = now[2 * r + n];
                    d_x[r][n] = half * value_of(own, r, 2 + n);
                    d_x[r][2 + n] = half * value_of(own, r, n);
                }
#pragma unroll
                for (int i = 0; i < 4; i++)
                    d_x[r][i] += (QUERIES ? 4 : 1) * now[8 + (i >> 1) * 4 + 2 * r + (i & 1)];
                continue;
            }
#pragma unroll
            for (int odd = 1; odd >= 0; odd--) {
                const int d = 2 * (4 - step) + odd;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float gradient = now[8 * odd + (i >> 1) * 4 + 2 * r + (i & 1)];
                    const u32 pair = shifted(x[r], d + (i >> 1) * 8);
                    const float second = i & 1 ? high(pair) : low(pair);
                    if (d == 0) d_x[r][i] += gradient * second * (QUERIES ? 1 : 2);
                    else d_x[r][i] += gradient * second, rolled[r][i] += gradient * value_of(own, r, i);
                }
                if (d > 0) roll(rolled[r], t);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) d_x[r][i] += rolled[r][i];
}

// s and the gradients of weights of a block of pairs.
__device__ __forceinline__ void start_pairs(
    float (&s)[KEYS / 2], float (&d_a)[KEYS / 2], const u32 (&own)[4], const Left& y, u64 keys, u32 values) {
    START_KEYS<0>(s, own, keys);
#pragma unroll
    for (int part = 0; part < V / 16; part++) {
        const u64 rows = descriptor<1>(values + part / 4 * VALUE_PANEL + part % 4 * 32, 16, 1024);
        if (part == 0) START_KEYS<0>(d_a, y[part], rows);
        else ADD_KEYS<0>(d_a, y[part], rows);
    }
}

// The thread's columns of a block, from `deltas` on; none past `left`.
__device__ __forceinline__ void load_deltas(float (&of)[KEYS / 16][4], const float* deltas, int left, int t) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        const int column = (i >> 1) * 8 + 2 * t + (i & 1);
        of[i >> 2][i & 3] = column < left ? deltas[column] : 0;
    }
}

// Gradients of s, as the left side of a product: that of a plus delta, times 1 + s, scaled. delta is
// a row's, or (LATER) a column's. `place` as in weigh.
template <bool MASKED, bool LATER> __device__ __forceinline__ void weigh_gradients(
    u32 (&d_s)[KEYS / 16][4], const float (&s)[KEYS / 2], const float (&d_a)[KEYS / 2],
    const float (&delta)[2], const float (&deltas)[KEYS / 16][4], int place, int g, int t, float scale) {
    const float square = scale * scale;
#pragma unroll
    for (int part = 0; part < KEYS / 16; part++, place++) {
        if (MASKED && (LATER ? place < 0 : place > 0)) {
#pragma unroll
            for (int i = 0; i < 4; i++) d_s[part][i] = 0;
            continue;
        }
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float added = LATER ? deltas[part][(i >> 2) * 2 + (i & 1)] : delta[i >> 1 & 1];
            x[i] = (d_a[8 * part + i] + added) * (scale + s[8 * part + i] * square);
        }
        if (MASKED && place == 0) mask<LATER>(x, g, t);
#pragma unroll
        for (int i = 0; i < 8; i += 2) d_s[part][i >> 1] = pack(x[i], x[i + 1]);
    }
}

// Two rows' four columns of a thread, as a product of 16 columns has them, and into memory.
__device__ __forceinline__ void as_product(float (&product)[8], const float (&x)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) product[i] = x[i >> 1 & 1][(i >> 2) * 2 + (i & 1)];
}
__device__ __forceinline__ void store_product(u16* to, i64 H, const float (&product)[8], int row, int length, int t) {
#pragma unroll
    for (int r = 0; r < 2; r++)
        store_words(to + (i64)(row + 8 * r) * H * 16, pack(product[2 * r], product[2 * r + 1]),
            pack(product[4 + 2 * r], product[5 + 2 * r]), t, row + 8 * r < length);
}

// d_x, as a product has it, and what pairs add: 64 rows, with all columns up to (LATER: from) each
// row's own. `deltas` begin at the segment's first token.
template <bool LATER> __device__ __forceinline__ void pair_gradient(
    float (&d_x)[8], const u32 (&own)[4], const Left& y, const float (&delta)[2], const float* deltas, int length,
    u32 shared, int tile, int count, int warp, int g, int t, float scale) {
    constexpr int NEXT = LATER ? -1 : 1, PARTS = TILE / KEYS;
    int block = LATER ? (tile + 1) * PARTS + count - 1 : 0;
    const u64 keys = descriptor<3>(shared + AT_KEYS, 0, 256);
    const u32 values = shared + AT_VALUES;
    float s[KEYS / 2], d_a[KEYS / 2];
    u32 d_s[KEYS / 16][4];
    wgmma_fence();
    start_pairs(s, d_a, own, y, keys + block * KEYS * 2, values + block * KEYS * 128);
    wgmma_commit();
    float of[KEYS / 16][4];
    if (LATER) load_deltas(of, deltas + block * KEYS, length - block * KEYS, t);
    wgmma_wait<0>();
#pragma unroll 1
    for (int n = 0; n < count; n++) {
        settle(s);
        settle(d_a);
        weigh_gradients<false, LATER>(d_s, s, d_a, delta, of, 0, g, t, scale);
        const int next = block + NEXT;
        settle(s);
        settle(d_a);
        settle(d_x);
        wgmma_fence();
        start_pairs(s, d_a, own, y, keys + next * KEYS * 2, values + next * KEYS * 128);
#pragma unroll
        for (int part = 0; part < KEYS / 16; part++) add_16<1>(d_x, d_s[part], keys + block * KEYS * 2 + part * 32);
        wgmma_commit();
        block = next;
        if (LATER) load_deltas(of, deltas + block * KEYS, length - block * KEYS, t);
        wgmma_wait<0>();
    }
#pragma unroll
    for (int n = 0; n < PARTS; n++) {
        settle(s);
        settle(d_a);
        const int place = (LATER ? PARTS - 1 - n : n) * (KEYS / 16) - warp;
        weigh_gradients<true, LATER>(d_s, s, d_a, delta, of, place, g, t, scale);
        const int next = block + NEXT;
        settle(s);
        settle(d_a);
        settle(d_x);
        wgmma_fence();
        if (n + 1 < PARTS) start_pairs(s, d_a, own, y, keys + next * KEYS * 2, values + next * KEYS * 128);
#pragma unroll
        for (int part = 0; part < KEYS / 16; part++) add_16<1>(d_x, d_s[part], keys + block * KEYS * 2 + part * 32);
        wgmma_commit();
        block = next;
        if (LATER && n + 1 < PARTS) load_deltas(of, deltas + block * KEYS, length - block * KEYS, t);
        wgmma_wait<0>();
    }
    settle(d_x);
}
