// What the kernels of a segment share on Hopper, at feature_dim 16: attend.cu, gradients.cu.
//
// One block of two warpgroups has a segment of 256 tokens and one head. A state and all rows of
// two tensors stand in shared memory, as wgmma reads them; a warpgroup takes 64 rows of the
// others at a time, twice (tiles 0 and 3, or 1 and 2: five blocks of pairs each).
// Features never leave registers: a thread reads its two rows rotated to begin at its own
// column, so that x_i x_(i+r) is a product of two registers known at compile time.
//
// hopper.py defines V (head_dim, a multiple of 16 up to 128), STRIPS (whether sums of strips
// are added to states), KEYS, BATCH and the wgmma wrappers' names.

constexpr int LENGTH = 256, TILE = 64, F = 153, ROWS = 160, THREADS = 256;
constexpr int PANELS = (V + 63) / 64;
constexpr int STATE_PANEL = ROWS * 128, VALUE_PANEL = LENGTH * 128;
constexpr int AT_VALUES = PANELS * STATE_PANEL;
constexpr int AT_KEYS = AT_VALUES + PANELS * VALUE_PANEL;
constexpr int AT_MIXER = AT_KEYS + LENGTH * 32;

// Pairs of bfloat16: 1/32, 1/16 and 1/4, the Taylor weights of squares, products and x.
constexpr u32 SQUARES = 0x3D003D00, PRODUCTS = 0x3D803D80, LINEAR = 0x3E803E80;

// A segment and head: first token, tokens, and what stands where.
struct Segment {
    i64 begin, slot, strip_slot;
    int head, length;
    bool inside, has_state;
};
// The table says whether the strip has anything before (4) or, which counts for gradients, after (5) it.
__device__ __forceinline__ Segment segment_of(const int* segments, i64 H, bool later) {
    const int heads = (int)H, head = blockIdx.x % heads;
    const i64 number = blockIdx.x / heads;
    const int* entry = segments + number * 6;
    const bool inside = later ? entry[5] == 0 : entry[4] > 0;
    // With strips there always is a state. As a branch that is not known to the compiler it keeps what
    // stands on both sides apart, which takes fewer registers.
    const bool has_state = STRIPS ? entry[3] >= 0 : inside;
    return {entry[1], number * H + head, entry[3] * H + head, head, entry[2] - entry[1], inside, has_state};
}

// A segment's state: what its strip gathered before it, if it is inside, and what came before that.
struct State {
    const u16* numerator;
    const float* normaliser;
    const u16* before;
    const float* before_normaliser;
    bool inside, exists;
};
__device__ __forceinline__ State state_of(
    const Segment& at, const u16* numerator, const float* normaliser, const u16* before, const float* before_normaliser) {
    return {numerator + at.slot * F * V, normaliser + at.slot * F,
        before + at.strip_slot * F * V, before_normaliser + at.strip_slot * F, at.inside, at.has_state};
}

// Where chunk c (8 columns) of a row stands: panels of 64 columns, swizzled by 128 bytes.
__device__ __forceinline__ u32 place(int row, int c, int panel) {
    return (c >> 3) * panel + row * 128 + (((c & 7) ^ (row & 7)) << 4);
}

// An entry of the normaliser.
__device__ __forceinline__ float sum_of(const State& state, int i) {
    return (state.inside ? state.normaliser[i] : 0) + (STRIPS ? state.before_normaliser[i] : 0);
}

// Copies go by LANES threads a row, STEP rows at a time: a multiple of 8, so that a thread's place
// in the swizzle stays.
constexpr int LANES = V <= 16 ? 2 : V <= 32 ? 4 : V <= 64 ? 8 : 16, STEP = THREADS / LANES;

// The linear term of a normaliser for the thread's column i (of 4), read when it is needed.
__device__ __forceinline__ float linear_of(const State& state, int t, int i) {
    const int column = 1 + 2 * t + (i & 1) + (i >> 1) * 8;
    return (state.inside ? load_here(state.normaliser + column) : 0) + (STRIPS ? load_here(state.before_normaliser + column) : 0);
}

// The numerator into its panels; sums of strips, in bfloat16 too, pass through registers. Rows are
// diagonals 0 to 7, half of the eighth, the constant, 7 rows of zeros, the linear terms.
__device__ __forceinline__ void load_state(u32 shared, const State& state, int thread) {
    const int row = thread / LANES, c = thread % LANES;
    const u32 to = shared + place(row, c, STATE_PANEL);
    if (c >= V / 8) return;
#pragma unroll
    for (int n = 0; n * STEP < ROWS; n++) {
        const int r = row + n * STEP;
        // Diagonals stand as in memory.
        const bool plain = (n + 1) * STEP <= 136;
        const int f = plain || r < 136 ? r + 17 : r == 136 ? 0 : r - 143;
        const bool real = plain || r <= 136 || r >= 144;
        if ((n + 1) * STEP > ROWS && r >= ROWS) continue;
        const i64 at = real ? f * V + c * 8 : 0;
        if (!STRIPS) {
            copy16(to + n * STEP * 128, state.numerator + at, real);
            continue;
        }
        uint4_ a = {0, 0, 0, 0}, b = {0, 0, 0, 0};
        if (real && state.inside) a = *(const uint4_*)(state.numerator + at);
        if (real) b = *(const uint4_*)(state.before + at);
        store16(to + n * STEP * 128, uint4_{added(a.x, b.x), added(a.y, b.y), added(a.z, b.z), added(a.w, b.w)});
    }
}

// All rows of x (keys, or queries) and y (values, or g); zeros past the end.
__device__ __forceinline__ void load_rows(
    u32 shared, const u16* x, i64 x_stride, const u16* y, i64 y_stride, int length, int thread) {
    {
        const int row = thread >> 1, c = thread & 1;
        const u32 to = shared + AT_KEYS + row * 32 + ((c ^ (row >> 2 & 1)) << 4);
        x += row * x_stride + c * 8;
#pragma unroll
        for (int n = 0; n < 2; n++) copy16(to + n * 128 * 32, x + n * 128 * x_stride, row + n * 128 < length);
    }
    const int row = thread / LANES, c = thread % LANES;
    const u32 to = shared + AT_VALUES + place(row, c, VALUE_PANEL);
    if (c >= V / 8) return;
    y += row * y_stride + c * 8;
#pragma unroll
    for (int n = 0; n < LENGTH / STEP; n++) copy16(to + n * STEP * 128, y + n * STEP * y_stride, row + n * STEP < length);
}

// The second-order terms of the normaliser as the right side of multiply_add: registers 0 to 3 for
// a lane's columns g, 4 to 7 for g + 8; of four, two are rounded and two are what that lost. A
// thread reads two terms and writes one register. x times them is the derivative by x, so that
// half of x (terms) x is the sum itself.
template <bool QUERIES> __device__ __forceinline__ float2_ read_terms(const State& state, int thread) {
    const int lane = thread & 31, place = thread >> 5;
    float z[2];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int i = 2 * (lane & 3) + n + 8 * (place & 1), j = (lane >> 2) + (place >> 2) * 8, shift = (j - i) & 15;
        const bool above = shift < 8 || (shift == 8 && i < 8);
        z[n] = sum_of(state, 17 + (above ? shift * 16 + i : (16 - shift) * 16 + j));
        z[n] *= QUERIES ? 1.0f / 16 : i == j ? 2.0f : 1.0f;
    }
    return float2_{z[0], z[1]};
}
__device__ __forceinline__ void write_terms(u32 to, float2_ z, int thread) {
    const u32 coarse = pack(z.x, z.y);
    store4(to + thread * 4, thread & 64 ? pack(z.x - low(coarse), z.y - high(coarse)) : coarse);
}

// After a state's copies: rows of x and y, then what passes through registers, which waits. `touched` is
// kept where the terms come, for its load's sake.
__device__ __forceinline__ void load_rest(
    u32 shared, const State& state, u32 touched, float2_ terms,
    const u16* x, i64 x_stride, const u16* y, i64 y_stride, int length, int thread) {
    commit_copies();
    load_rows(shared, x, x_stride, y, y_stride, length, thread);
    commit_copies();
    keep(shared + AT_MIXER + thread * 4, touched);
    if (state.exists) write_terms(shared + AT_MIXER, terms, thread);
    if (STRIPS) {
        load_state(shared, state, thread);
        stores_before_wgmma();
    }
}

// x times the terms: of rows g and g + 8, the thread's four columns.
__device__ __forceinline__ void times_terms(float (&second)[2][4], const u32 (&own)[4], u32 shared, int lane) {
#pragma unroll
    for (int block = 0; block < 2; block++) {
        const u32 z = shared + AT_MIXER + block * 512 + lane * 4;
        float product[4] = {0, 0, 0, 0};
        multiply_add(product, own, load4(z), load4(z + 128));
        multiply_add(product, own, load4(z + 256), load4(z + 384));
#pragma unroll
        for (int i = 0; i < 4; i++) second[i >> 1][2 * block + (i & 1)] = product[i];
    }
}

// Rows g and g + 8 of x, each from column 2 t on: read whole, then rotated by t words. `own` is them as
// the left side of a product.
__device__ __forceinline__ void load_own(
    u32 (&x)[2][8], u32 (&own)[4], const u16* from, i64 stride, int row, int length, int t) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        uint4_ words[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        if (row + 8 * r < length) {
            const uint4_* source = (const uint4_*)(from + (row + 8 * r) * stride);
            words[0] = source[0], words[1] = source[1];
        }
        const u32 plain[8] = {words[0].x, words[0].y, words[0].z, words[0].w, words[1].x, words[1].y, words[1].z, words[1].w};
        u32 by_one[8];
#pragma unroll
        for (int m = 0; m < 8; m++) by_one[m] = t & 1 ? plain[(m + 1) & 7] : plain[m];
#pragma unroll
        for (int m = 0; m < 8; m++) x[r][m] = t & 2 ? by_one[(m + 2) & 7] : by_one[m];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) own[i] = x[i & 1][2 * (i & 2)];
}
// Columns (c + r, c + r + 1) of a row that begins at column c; no column beyond the 16th.
__device__ __forceinline__ u32 shifted(const u32 (&x)[8], int r) {
    return r & 1 ? __byte_perm(x[r / 2 & 7], x[(r / 2 + 1) & 7], 0x5432) : x[r / 2 & 7];
}
// The thread's column i (of 4) in row r, of x as the left side of a product.
__device__ __forceinline__ float value_of(const u32 (&own)[4], int r, int i) {
    const u32 pair = own[r + (i >> 1) * 2];
    return i & 1 ? high(pair) : low(pair);
}

// Two blocks of 8 columns of a row, the thread's two words. Lanes of a pair swap halves, so that
// 32 bytes are touched in one piece.
__device__ __forceinline__ void store_words(u16* row, u32 even, u32 odd, int t, bool real) {
    const u32 got = __shfl_xor_sync(~0u, t & 1 ? even : odd, 1);
    const uint2_ pair = t & 1 ? uint2_{got, odd} : uint2_{even, got};
    if (real) *(uint2_*)(row + (t & 1) * 8 + (t >> 1) * 4) = pair;
}
// The same way back: words as they stand in memory, then the thread's own two.
__device__ __forceinline__ void load_words(u32 (&words)[2], const u16* row, int t, bool real) {
    uint2_ pair = {0, 0};
    if (real) pair = *(const uint2_*)(row + (t & 1) * 8 + (t >> 1) * 4);
    words[0] = pair.x, words[1] = pair.y;
}
__device__ __forceinline__ void exchange_words(u32 (&words)[2], int t) {
    const u32 got = __shfl_xor_sync(~0u, t & 1 ? words[0] : words[1], 1);
    words[0] = t & 1 ? got : words[0];
    words[1] = t & 1 ? words[1] : got;
}

// acc + phi(x) times the state; only queries' features have Taylor weights.
template <bool QUERIES> __device__ __forceinline__ void read_state(
    float (&acc)[V / 2], const u32 (&x)[2][8], u32 shared, int t) {
    const u64 state = descriptor<1>(shared, STATE_PANEL, 1024);
    u32 phi[10][4];
#pragma unroll
    for (int batch = 0; batch < 10 / BATCH; batch++) {
#pragma unroll
        for (int d = BATCH * batch; d < BATCH * (batch + 1); d++)
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const u32 own = x[r][4 * side];
                    const u32 first = !QUERIES ? own : times(own, d == 0 ? SQUARES : d == 9 ? LINEAR : PRODUCTS);
                    u32 feature;
                    if (d < 8) feature = times(first, shifted(x[r], d + 8 * side));
                    else if (d == 9) feature = first;
                    else if (side == 0) feature = times(first, x[r][4]);
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

// Zeros where, in 16 columns on the diagonal, a column comes after (LATER: before) its row.
template <bool LATER> __device__ __forceinline__ void mask(float (&x)[8], int g, int t) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int beyond = (i >> 2) * 8 + 2 * t + (i & 1) - g - (i & 2) * 4;
        if (LATER ? beyond < 0 : beyond > 0) x[i] = 0;
    }
}

// Exact weights 1 + s + s^2 / 2 of a block of pairs, as the left side of a product; below with
// their sums. MASKED: 16 columns from part `place` on are on the wrong side of the warp's rows
// (LATER: before them), those at 0 partly so.
template <bool MASKED, bool LATER> __device__ __forceinline__ void weigh(
    u32 (&weights)[KEYS / 16][4], float (&below)[2], const float (&s)[KEYS / 2], int place, int g, int t, float scale) {
    const float square = 0.5f * scale * scale;
#pragma unroll
    for (int part = 0; part < KEYS / 16; part++, place++) {
        if (MASKED && (LATER ? place < 0 : place > 0)) {
#pragma unroll
            for (int i = 0; i < 4; i++) weights[part][i] = 0;
            continue;
        }
        float a[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float x = s[8 * part + i];
            a[i] = 1 + x * (scale + x * square);
        }
        if (MASKED && place == 0) mask<LATER>(a, g, t);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            if (!LATER) below[i >> 1 & 1] += a[i] + a[i + 1];
            weights[part][i >> 1] = pack(a[i], a[i + 1]);
        }
    }
}

// acc and below with the pairs of 64 rows and all columns up to (LATER: from) each row's own. The
// blocks on the rows' own tile come last; `count` blocks come before.
template <bool LATER> __device__ __forceinline__ void add_pairs(
    float (&acc)[V / 2], float (&below)[2], const u32 (&own)[4],
    u32 shared, int tile, int count, int warp, int g, int t, float scale) {
    constexpr int NEXT = LATER ? -1 : 1, PARTS = TILE / KEYS;
    const int first = LATER ? (tile + 1) * PARTS + count - 1 : 0;
    u64 keys = descriptor<3>(shared + AT_KEYS + first * KEYS * 32, 0, 256);
    u64 values = descriptor<1>(shared + AT_VALUES + first * KEYS * 128, VALUE_PANEL, 1024);
    float s[KEYS / 2];
    u32 weights[KEYS / 16][4];
    wgmma_fence();
    START_KEYS<0>(s, own, keys);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll 1
    for (int block = 0; block < count; block++) {
        settle(s);
        weigh<false, LATER>(weights, below, s, 0, g, t, scale);
        keys += NEXT * KEYS * 2;
        settle(s);
        settle(acc);
        wgmma_fence();
        START_KEYS<0>(s, own, keys);
#pragma unroll
        for (int part = 0; part < KEYS / 16; part++) ADD_V<1>(acc, weights[part], values + part * 128);
        wgmma_commit();
        values += NEXT * KEYS * 8;
        wgmma_wait<0>();
    }
#pragma unroll
    for (int block = 0; block < PARTS; block++) {
        settle(s);
        weigh<true, LATER>(weights, below, s, (LATER ? PARTS - 1 - block : block) * (KEYS / 16) - warp, g, t, scale);
        keys += NEXT * KEYS * 2;
        settle(s);
        settle(acc);
        wgmma_fence();
        if (block + 1 < PARTS) START_KEYS<0>(s, own, keys);
#pragma unroll
        for (int part = 0; part < KEYS / 16; part++) ADD_V<1>(acc, weights[part], values + part * 128);
        wgmma_commit();
        values += NEXT * KEYS * 8;
        wgmma_wait<0>();
    }
    settle(acc);
}
