// States of Taylor linear attention on Hopper: what kernels/states.py's sum_states computes, at
// feature_dim 16. One block of three warpgroups walks a strip of segments with one head and N
// columns of values; the sums stay in registers, chunks of 64 tokens come in a ring.
//
// Warp n of the block has diagonal n of features (the eighth, half and with the constant; the
// linear terms; two are idle). ldmatrix brings keys transposed, lanes exchange the rolled rows.
//
// hopper.py defines V (head_dim), N (columns of a block, a multiple of 8 up to 64), QUERIES
// (gradients: queries, last segment first), STAGES of the ring and ADD_N.

constexpr int LENGTH = 256, CHUNK = 64, F = 153, THREADS = 384;
// A stage of the ring: values, keys. After it the factors of up to three chunks.
constexpr int AT_KEYS = CHUNK * 128, STAGE = AT_KEYS + CHUNK * 32;

// A token's factor in the normaliser, for a product of 8 columns: in two parts, then zeros.
__device__ __forceinline__ void store_factor(u32 to, float factor) {
    const u32 coarse = pack(factor, 0) & 0xFFFF;
    store16(to, uint4_{pack(low(coarse), factor - low(coarse)), 0, 0, 0});
}

// 16 tokens of keys, transposed: rows g and g + 8 of the left side of a product.
__device__ __forceinline__ void load_transposed(u32 (&x)[4], u32 keys, int lane) {
    // Lanes 8 i to 8 i + 7 point to the rows of matrix i: tokens 8 (i / 2) on, channels 8 (i % 2) on.
    const int row = (lane & 7) + (lane >> 4) * 8, c = lane >> 3 & 1;
    load_matrices(x, keys + row * 32 + ((c ^ (row >> 2 & 1)) << 4));
}

// Features of diagonal d: x times x rolled by d, whose row g is lane `from`'s.
template <int D> __device__ __forceinline__ void features_of(u32 (&phi)[4], const u32 (&x)[4], int d, int from, bool wraps) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        if (D < 8) {
            const u32 above = __shfl_sync(~0u, x[i], from), below = __shfl_sync(~0u, x[i + 1], from);
            phi[i] = times(x[i], wraps ? below : above);
            phi[i + 1] = times(x[i + 1], wraps ? above : below);
        } else {
            const int g = threadIdx.x >> 2 & 7;
            phi[i] = d == 8 ? times(x[i], x[i + 1]) : d == 9 ? x[i] : 0;
            phi[i + 1] = d == 8 ? (g == 0 ? 0x3F803F80 : 0) : d == 9 ? x[i + 1] : 0;
        }
    }
}

// Row `row` of diagonal d in a state, or -1.
__device__ __forceinline__ int feature_at(int d, int row) {
    if (d < 8) return 17 + d * 16 + row;
    if (d == 8) return row < 8 ? 145 + row : row == 8 ? 0 : -1;
    return d == 9 ? 1 + row : -1;
}
// The Taylor weight of its features, which queries have.
__device__ __forceinline__ float weight_at(int d, int row) {
    if (!QUERIES || (d == 8 && row == 8)) return 1;
    return d == 0 ? 1.0f / 32 : d == 9 ? 0.25f : 1.0f / 16;
}

// A warp's 16 rows of a state, in bfloat16. Lanes of a pair swap halves of two blocks of 8
// columns: 32 bytes in one piece.
__device__ __forceinline__ void store_rounded(u16* to, const float (&acc)[N / 2], int d, int g, int t) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int f = feature_at(d, g + 8 * r);
        const float weight = weight_at(d, g + 8 * r);
        u16* row = to + f * V;
#pragma unroll
        for (int j = 0; j + 1 < N / 8; j += 2) {
            const u32 even = pack(acc[4 * j + 2 * r] * weight, acc[4 * j + 2 * r + 1] * weight);
            const u32 odd = pack(acc[4 * j + 4 + 2 * r] * weight, acc[4 * j + 5 + 2 * r] * weight);
            const u32 got = __shfl_xor_sync(~0u, t & 1 ? even : odd, 1);
            const uint2_ pair = t & 1 ? uint2_{got, odd} : uint2_{even, got};
            if (f >= 0) *(uint2_*)(row + (j + (t & 1)) * 8 + (t >> 1) * 4) = pair;
        }
        if (N / 8 % 2 == 1 && f >= 0) {
            const int last = N / 2 - 4 + 2 * r;
            *(u32*)(row + N - 8 + 2 * t) = pack(acc[last] * weight, acc[last + 1] * weight);
        }
    }
}
// The same in float32.
__device__ __forceinline__ void store_exact(float* to, const float (&acc)[N / 2], int d, int g, int t) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int f = feature_at(d, g + 8 * r);
        const float weight = weight_at(d, g + 8 * r);
#pragma unroll
        for (int j = 0; j < N / 8; j++)
            if (f >= 0)
                *(float2_*)(to + f * V + 8 * j + 2 * t) = float2_{acc[4 * j + 2 * r] * weight, acc[4 * j + 2 * r + 1] * weight};
    }
}
// Its entries of the normaliser: both parts of the factor.
__device__ __forceinline__ void store_sums(float* to, const float (&sums)[4], int d, int g, int t) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int f = feature_at(d, g + 8 * r);
        if (f >= 0 && t == 0) to[f] = (sums[2 * r] + sums[2 * r + 1]) * weight_at(d, g + 8 * r);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) sum_states(
    const u16* __restrict__ x, const u16* __restrict__ y, const float* __restrict__ delta, const int* __restrict__ strips,
    u16* __restrict__ numerator, float* __restrict__ normaliser,
    float* __restrict__ strip_numerator, float* __restrict__ strip_normaliser,
    i64 x_stride_t, i64 x_stride_h, i64 y_stride_t, i64 y_stride_h, i64 T, i64 H) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = address(memory), factors = shared + STAGES * STAGE;
    const int thread = threadIdx.x, lane = thread & 31, g = lane >> 2, t = lane & 3;
    const int d = __shfl_sync(~0u, thread >> 5, 0);
    const int heads = (int)H, column = blockIdx.x % (V / N) * N;
    const int head = blockIdx.x / (V / N) % heads;
    const i64 strip = blockIdx.x / (V / N) / heads;
    const i64 begin = strips[strip * 4 + 1];
    const int length = strips[strip * 4 + 2] - strips[strip * 4 + 1];
    const i64 first_segment = strips[strip * 4 + 3];
    if (length <= 0) return;
    const int segments = (length + LENGTH - 1) / LENGTH;
    // Queries' walk begins with the last segment, of which all chunks count.
    const int chunks = QUERIES ? segments * (LENGTH / CHUNK) : (length + CHUNK - 1) / CHUNK;

    x += begin * x_stride_t + head * x_stride_h;
    y += begin * y_stride_t + head * y_stride_h + column;
    delta += head * T + begin;
    const int from = ((g + d) & 7) * 4 + t;
    const bool wraps = g + (d & 7) > 7;

    // A thread copies two pieces of values, 32 rows apart, or one of keys.
    const bool has_values = thread < 4 * N, has_keys = thread >= 256;
    const int row = has_keys ? thread - 256 >> 1 : thread / (N / 8);
    const int part = has_keys ? thread & 1 : thread % (N / 8);
    const u16* source = has_keys ? x + row * x_stride_t + part * 8 : y + row * y_stride_t + part * 8;
    const i64 stride = has_keys ? x_stride_t : y_stride_t;
    const u32 target = has_keys ? shared + AT_KEYS + row * 32 + ((part ^ (row >> 2 & 1)) << 4)
                                : shared + row * 128 + ((part ^ (row & 7)) << 4);
    // First token of chunk number c, in the order of the walk.
    const auto token_of = [&](int c) {
        const int number = c / (LENGTH / CHUNK);
        return (QUERIES ? segments - 1 - number : number) * LENGTH + c % (LENGTH / CHUNK) * CHUNK;
    };
    const auto load = [&](int c) {
        if (c < chunks && (has_values || has_keys)) {
            const u32 to = target + c % STAGES * STAGE;
            const int token = token_of(c);
            const u16* from = source + token * stride;
            copy16(to, from, token + row < length);
            if (has_values) copy16(to + 32 * 128, from + 32 * stride, token + row + 32 < length);
        }
        commit_copies();
    };
    // Factors in the normaliser: of keys 1, and of the last chunk's tokens past the end 0.
    const auto factor_of = [&](int c) {
        const int token = token_of(c) + thread;
        if (c >= chunks || thread >= CHUNK || token >= length) return 0.0f;
        return QUERIES ? delta[token] : 1.0f;
    };
    const auto put_factor = [&](int place, float factor) {
        if (thread < CHUNK) store_factor(factors + place * CHUNK * 16 + thread * 16, factor);
    };

    float factor = 0;
    if (QUERIES) {
        put_factor(0, factor_of(0));
        factor = factor_of(1);
    } else {
        put_factor(0, 1);
        put_factor(1, factor_of(chunks - 1));
        stores_before_wgmma();
    }
    for (int c = 0; c < STAGES - 2; c++) load(c);
    float acc[N / 2], sums[4];
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] = 0;

#pragma unroll 1
    for (int c = 0; c < chunks; c++) {
        if (QUERIES) {
            put_factor((c + 1) % 3, factor);
            stores_before_wgmma();
        }
        await_copies<STAGES - 3>();
        __syncthreads();
        load(c + STAGES - 2);
        if (QUERIES) factor = factor_of(c + 2);
        const u32 stage = shared + c % STAGES * STAGE;
        if (c > 0 && c % (LENGTH / CHUNK) == 0) {
            const int number = c / (LENGTH / CHUNK), segment = QUERIES ? segments - 1 - number : number;
            const i64 slot = (first_segment + segment) * H + head;
            store_rounded(numerator + slot * F * V + column, acc, d, g, t);
            if (column == 0) store_sums(normaliser + slot * F, sums, d, g, t);
        }
        const int place = QUERIES ? c % 3 : c == chunks - 1;
        const u64 values = descriptor<1>(stage, 0, 1024);
        const u64 weights = descriptor<0>(factors + place * CHUNK * 16, 128, 128);
        settle(acc);
        settle(sums);
        // Features of the second half are made while the first is multiplied.
        u32 phi[CHUNK / 16][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            constexpr int PARTS = CHUNK / 32;
            u32 keys[PARTS][4];
#pragma unroll
            for (int i = 0; i < PARTS; i++)
                load_transposed(keys[i], stage + AT_KEYS + (half * PARTS + i) * 16 * 32, lane);
            if (d < 8) {
#pragma unroll
                for (int i = 0; i < PARTS; i++) features_of<0>(phi[half * PARTS + i], keys[i], d, from, wraps);
            } else {
#pragma unroll
                for (int i = 0; i < PARTS; i++) features_of<8>(phi[half * PARTS + i], keys[i], d, from, wraps);
            }
            wgmma_fence();
#pragma unroll
            for (int i = half * PARTS; i < (half + 1) * PARTS; i++) {
                ADD_N<1>(acc, phi[i], values + i * 128);
                add_8<1>(sums, phi[i], weights + i * 16);
            }
            wgmma_commit();
        }
        wgmma_wait<0>();
        settle(acc);
        settle(sums);
    }
    const i64 slot = strip * H + head;
    store_exact(strip_numerator + slot * F * V + column, acc, d, g, t);
    if (column == 0) store_sums(strip_normaliser + slot * F, sums, d, g, t);
}
