// Outputs of Taylor linear attention on Hopper: what kernels/outputs.py computes, at feature_dim 16.
//
// One block of two warpgroups has a segment of 256 tokens and one head. All of its keys,
// values and its state stand in shared memory, as wgmma reads them; a warpgroup takes 64
// queries at a time, twice (tiles 0 and 3, or 1 and 2: five blocks of pairs each).
// Features never leave registers: a thread reads its two rows of q rotated to begin at
// its own column, so that x_i x_(i+r) is a product of two registers known at compile time.
//
// hopper.py defines V (head_dim, a multiple of 16 up to 128), STRIPS (whether sums of strips
// are added to states), KEYS, BATCH, ADD_V and START_KEYS.

constexpr int LENGTH = 256, TILE = 64, F = 153, ROWS = 160;
constexpr int PANELS = (V + 63) / 64;
constexpr int STATE_PANEL = ROWS * 128, VALUE_PANEL = LENGTH * 128;
constexpr int AT_VALUES = PANELS * STATE_PANEL;
constexpr int AT_KEYS = AT_VALUES + PANELS * VALUE_PANEL;
constexpr int AT_MIXER = AT_KEYS + LENGTH * 32;

// Pairs of bfloat16: 1/32, 1/16 and 1/4, the Taylor weights of squares, products and x.
constexpr u32 SQUARES = 0x3D003D00, PRODUCTS = 0x3D803D80, LINEAR = 0x3E803E80;

// Where chunk c (8 columns) of a row stands: panels of 64 columns, swizzled by 128 bytes.
__device__ __forceinline__ u32 place(int row, int c, int panel) {
    return (c >> 3) * panel + row * 128 + (((c & 7) ^ (row & 7)) << 4);
}

// Rows of a state in shared memory: diagonals 0 to 7, half of the eighth, the constant, 7
// rows of zeros, the linear terms.
__device__ __forceinline__ int state_row(int f) {
    return f == 0 ? 136 : f <= 16 ? 143 + f : f - 17;
}

// An entry of a normaliser: what the strip gathered before the segment, and what came before it.
__device__ __forceinline__ float sum_of(const float* in_strip, const float* before, bool inside, int i) {
    return (inside ? in_strip[i] : 0) + (STRIPS ? before[i] : 0);
}

// The numerator into its panels, in bfloat16.
__device__ __forceinline__ void load_state(
    u32 shared, const u16* in_strip, const float* before, bool inside, int thread) {
#pragma unroll 3
    for (int i = thread; i < F * (V / 8); i += 256) {
        const int f = i / (V / 8), c = i % (V / 8);
        const u32 to = shared + place(state_row(f), c, STATE_PANEL);
        if (!STRIPS) {
            copy16(to, in_strip + f * V + c * 8, true);
            continue;
        }
        uint4_ sums = {0, 0, 0, 0};
        if (inside) sums = *(const uint4_*)(in_strip + f * V + c * 8);
        const float4_ a = *(const float4_*)(before + f * V + c * 8);
        const float4_ b = *(const float4_*)(before + f * V + c * 8 + 4);
        sums.x = pack(low(sums.x) + a.x, high(sums.x) + a.y);
        sums.y = pack(low(sums.y) + a.z, high(sums.y) + a.w);
        sums.z = pack(low(sums.z) + b.x, high(sums.z) + b.y);
        sums.w = pack(low(sums.w) + b.z, high(sums.w) + b.w);
        store16(to, sums);
    }
    for (int i = thread; i < 7 * (V / 8); i += 256)
        copy16(shared + place(137 + i / (V / 8), i % (V / 8), STATE_PANEL), in_strip, false);
}

// The second-order terms of the normaliser as the right side of multiply_add: registers 0 to 3 for
// a lane's columns g, 4 to 7 for g + 8; of four, two are rounded and two are what that lost.
__device__ __forceinline__ void load_mixer(
    u32 to, const float* in_strip, const float* before, bool inside, int thread) {
    const int lane = thread & 31, place = thread >> 5;
    float z[2];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int i = 2 * (lane & 3) + n + 8 * (place & 1), j = (lane >> 2) + (place >> 2) * 8, shift = (j - i) & 15;
        const bool above = shift < 8 || (shift == 8 && i < 8);
        z[n] = sum_of(in_strip, before, inside, 17 + (above ? shift * 16 + i : (16 - shift) * 16 + j)) * (1.0f / 16);
    }
    const u32 coarse = pack(z[0], z[1]);
    store4(to + lane * 16 + (place >> 2) * 512 + (place & 3) * 4,
        place & 2 ? pack(z[0] - low(coarse), z[1] - high(coarse)) : coarse);
}

// Columns (c + r, c + r + 1) of a row that begins at column c; no column beyond the 16th.
__device__ __forceinline__ u32 shifted(const u32 (&x)[8], int r) {
    return r & 1 ? __byte_perm(x[r / 2 & 7], x[(r / 2 + 1) & 7], 0x5432) : x[r / 2 & 7];
}

// acc + phi(q) times the state.
__device__ __forceinline__ void read_state(float (&acc)[V / 2], const u32 (&x)[2][8], u32 shared) {
    const u64 state = descriptor<1>(shared, STATE_PANEL, 1024);
    u32 phi[10][4];
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int batch = 0; batch < 10 / BATCH; batch++) {
#pragma unroll
        for (int d = BATCH * batch; d < BATCH * (batch + 1); d++)
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const u32 own = x[r][4 * side];
                    u32 feature;
                    if (d == 0) feature = times(times(own, SQUARES), own);
                    else if (d < 8) feature = times(times(own, PRODUCTS), shifted(x[r], d + 8 * side));
                    else if (d == 9) feature = times(own, LINEAR);
                    else if (side == 0) feature = times(times(own, PRODUCTS), x[r][4]);
                    else feature = t == 0 ? 0x3F80 : 0;  // the constant, and zeros
                    phi[d][r + 2 * side] = feature;
                }
        if (batch == 0) settle(acc);
        wgmma_fence();
#pragma unroll
        for (int d = BATCH * batch; d < BATCH * (batch + 1); d++) ADD_V<1>(acc, phi[d], state + d * 128);
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    settle(acc);
}

// Exact weights 1 + s + s^2 / 2 of a block of keys, as the left side of a product; below with
// their sums. MASKED: keys later than the query do not count, in columns from `column` on.
template <bool MASKED> __device__ __forceinline__ void weigh(
    u32 (&weights)[KEYS / 16][4], float (&below)[2], const float (&s)[KEYS / 2], int row, int column, float scale) {
    const float square = 0.5f * scale * scale;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i += 2) {
        float a[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            a[n] = 1 + s[i + n] * (scale + s[i + n] * square);
            if (MASKED && (i >> 2) * 8 + column + n > row + (i & 2) * 4) a[n] = 0;
            below[i >> 1 & 1] += a[n];
        }
        weights[i >> 3][i >> 1 & 3] = pack(a[0], a[1]);
    }
}

// acc and below with the pairs of keys up to each query's own.
__device__ __forceinline__ void add_pairs(
    float (&acc)[V / 2], float (&below)[2], const u32 (&own)[4], u32 shared, int tile, int row, int column, float scale) {
    u64 keys = descriptor<3>(shared + AT_KEYS, 0, 256);
    u64 values = descriptor<1>(shared + AT_VALUES, VALUE_PANEL, 1024);
    float s[KEYS / 2];
    u32 weights[KEYS / 16][4];
    wgmma_fence();
    START_KEYS<0>(s, own, keys);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll 1
    for (int block = 0; block < tile * (TILE / KEYS); block++) {
        settle(s);
        weigh<false>(weights, below, s, row, column, scale);
        keys += KEYS * 2;
        settle(s);
        settle(acc);
        wgmma_fence();
        START_KEYS<0>(s, own, keys);
#pragma unroll
        for (int part = 0; part < KEYS / 16; part++) ADD_V<1>(acc, weights[part], values + part * 128);
        wgmma_commit();
        values += KEYS * 8;
        wgmma_wait<0>();
    }
#pragma unroll
    for (int block = 0; block < TILE / KEYS; block++) {
        settle(s);
        weigh<true>(weights, below, s, row, column + block * KEYS, scale);
        settle(s);
        settle(acc);
        wgmma_fence();
        if (block + 1 < TILE / KEYS) START_KEYS<0>(s, own, keys + (block + 1) * KEYS * 2);
#pragma unroll
        for (int part = 0; part < KEYS / 16; part++) ADD_V<1>(acc, weights[part], values + part * 128);
        wgmma_commit();
        values += KEYS * 8;
        wgmma_wait<0>();
    }
    settle(acc);
}

extern "C" __global__ void __launch_bounds__(256, 2) attend(
    const u16* q, const u16* k, const u16* v, u16* out, float* inverse, const int* segments,
    const u16* numerator, const float* normaliser,
    const float* strip_numerator, const float* strip_normaliser,
    i64 q_stride_t, i64 q_stride_h, i64 k_stride_t, i64 k_stride_h, i64 v_stride_t, i64 v_stride_h,
    i64 T, i64 H, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = address(memory);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5 & 3;
    const int half = __shfl_sync(~0u, thread >> 7, 0);  // uniform, so that wgmma may be in flight
    const int g = lane >> 2, t = lane & 3;
    const int heads = (int)H, head = blockIdx.x % heads;
    const i64 segment = blockIdx.x / heads;
    const int* entry = segments + segment * 6;
    const i64 begin = entry[1];
    const int length = entry[2] - entry[1];
    const i64 strip = entry[3];
    const bool inside = entry[4] > 0, has_state = inside || STRIPS;
    if (length <= 0) return;

    q += begin * q_stride_t + head * q_stride_h;
    k += begin * k_stride_t + head * k_stride_h;
    v += begin * v_stride_t + head * v_stride_h;
    out += (begin * H + head) * V;
    inverse += head * T + begin;
    numerator += (segment * H + head) * F * V;
    normaliser += (segment * H + head) * F;
    strip_numerator += (strip * H + head) * F * V;
    strip_normaliser += (strip * H + head) * F;

    // The state first: it is needed first. Keys and values come while it is used.
    float constant = 0, vector[4] = {0, 0, 0, 0};
    if (has_state) {
        load_state(shared, numerator, strip_numerator, inside, thread);
        load_mixer(shared + AT_MIXER, normaliser, strip_normaliser, inside, thread);
        constant = sum_of(normaliser, strip_normaliser, inside, 0);
#pragma unroll
        for (int i = 0; i < 4; i++)
            vector[i] = scale * sum_of(normaliser, strip_normaliser, inside, 1 + 2 * t + (i & 1) + (i >> 1) * 8);
    }
    commit_copies();
    for (int i = thread; i < LENGTH * 2; i += 256) {
        const int row = i >> 1, c = i & 1;
        copy16(shared + AT_KEYS + row * 32 + ((c ^ (row >> 2 & 1)) << 4), k + row * k_stride_t + c * 8, row < length);
    }
#pragma unroll 4
    for (int i = thread; i < LENGTH * (V / 8); i += 256) {
        const int row = i / (V / 8), c = i % (V / 8);
        copy16(shared + AT_VALUES + place(row, c, VALUE_PANEL), v + row * v_stride_t + c * 8, row < length);
    }
    commit_copies();
    await_copies<1>();
    if (STRIPS) stores_before_wgmma();
    __syncthreads();

#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        const int tile = turn == 0 ? half : 3 - half;
        const int first = tile * TILE, row = first + warp * 16 + g;
        const bool any = first < length;
        float acc[V / 2];
#pragma unroll
        for (int i = 0; i < V / 2; i++) acc[i] = 0;
        u32 own[4];  // q as the left side of a product
        float below[2] = {0, 0};
        if (any) {
            u32 x[2][8];  // rows g and g + 8 of q, from column 2 t on
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const bool real = row + 8 * r < length;
                const u32* source = (const u32*)(q + (row + 8 * r) * q_stride_t);
#pragma unroll
                for (int m = 0; m < 8; m++) x[r][m] = real ? source[(t + m) & 7] : 0;
            }
            own[0] = x[0][0], own[1] = x[1][0], own[2] = x[0][4], own[3] = x[1][4];
            if (has_state) {
                read_state(acc, x, shared);
                float terms[2][4];
#pragma unroll
                for (int block = 0; block < 2; block++) {
                    const uint4_ z = load16(shared + AT_MIXER + block * 512 + lane * 16);
                    float product[4] = {0, 0, 0, 0};
                    multiply_add(product, own, z.x, z.y);
                    multiply_add(product, own, z.z, z.w);
#pragma unroll
                    for (int i = 0; i < 4; i++) terms[i >> 1][2 * block + (i & 1)] = product[i];
                }
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const u32 pair = own[r + (i >> 1) * 2];
                        const float value = i & 1 ? high(pair) : low(pair);
                        below[r] += value * (0.5f * terms[r][i] + vector[i]);
                    }
            }
        }
        if (turn == 0) {
            await_copies<0>();
            __syncthreads();
        }
        if (!any) continue;
        add_pairs(acc, below, own, shared, tile, warp * 16 + g, 2 * t, scale);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = below[r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float one_over = 1 / (sum + constant);
            const bool real = row + 8 * r < length;
            if (real && t == 0) inverse[row + 8 * r] = one_over;
            u16* target = out + (i64)(row + 8 * r) * H * V;
            // Lanes of a pair swap halves of two blocks of 8 columns: 32 bytes in one piece.
#pragma unroll
            for (int j = 0; j < V / 8; j += 2) {
                const u32 even = pack(acc[4 * j + 2 * r] * one_over, acc[4 * j + 2 * r + 1] * one_over);
                const u32 odd = pack(acc[4 * j + 4 + 2 * r] * one_over, acc[4 * j + 5 + 2 * r] * one_over);
                const u32 got = __shfl_xor_sync(~0u, t & 1 ? even : odd, 1);
                const uint2_ pair = t & 1 ? uint2_{got, odd} : uint2_{even, got};
                if (real) *(uint2_*)(target + (j + (t & 1)) * 8 + (t >> 1) * 4) = pair;
            }
        }
    }
}
