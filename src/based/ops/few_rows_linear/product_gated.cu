// value * silu(gate), or with taps silu(conv(value)) * gate, of (x W^T) / rms + bias: value and gate are the
// halves of W's rows, in blocks of 8 by 8, rms given by sums of squares. `past` moves on by one token.
// Constants besides product.cuh's: N (outputs), WIDTH (taps). Without a bias its pointer is null.

constexpr int OLDER = WIDTH > 1 ? WIDTH - 1 : 0, SLOTS = OLDER > 0 ? OLDER : 1;
// Bytes of a row's outputs in shared memory, and 16 more, so that its neighbours lie in other banks.
constexpr int LINE = WARPS * 16 + 16;
static_assert((1 + OLDER) * OWN * LINE <= SUMS, "outputs go where x and W were");

__device__ __forceinline__ float half_of(u32 two, int i) { return i ? high(two) : low(two); }

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 64, 1) product_gated(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const float* squares, const u16* bias,
    const u16* taps, u16* past, u16* out, float eps, i64 rows) {
    extern __shared__ unsigned char memory[];
    const Program program(address(memory));
    if (program.feeds()) program.start(x, w, program.tile * WARPS);
    int block = (program.tile * WARPS + program.warp) * 8, n = block + program.pair(), of = block + program.lane / 4;
    int row = program.row() + program.odd();
    const u32* held = (const u32*)(past + (i64)row * OLDER * N + n);
    u32 shift[2] = {}, tap[WIDTH > 0 ? 2 * WIDTH : 1], older[EIGHTS][SLOTS];
    float y[EIGHTS][4];
    if (program.multiplies()) {
        if (bias) shift[0] = bias[of], shift[1] = bias[N + of];
#pragma unroll
        for (int t = 0; t < 2 * WIDTH; t++) tap[t] = taps[n * WIDTH + t];
#pragma unroll
        for (int i = 0; i < EIGHTS; i++)
#pragma unroll
            for (int s = 0; s < OLDER; s++) older[i][s] = row + 8 * i < rows ? held[(8 * i * OLDER + s) * N / 2] : 0;
    }
    program.ready();
    if (program.feeds()) return program.feed(x, w, program.tile * WARPS);
    if (program.scales()) return program.find_scales(squares, eps, rows);
    program.multiply_normed(squares, eps, rows, shift, y);
    if (WIDTH > 0) settle(tap);
    // All shuffles together (the compiler would keep none that it can put off), so that none waits for a silu.
    u32 made[EIGHTS], newest[EIGHTS];
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        if (WIDTH == 0) continue;
        newest[i] = program.turned(pack(y[i][0], y[i][1]));
        program.turn(y[i][2], y[i][3]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            y[i][h] = half_of(newest[i], h) * low(tap[h * WIDTH + WIDTH - 1]);
#pragma unroll
            for (int s = 0; s < OLDER; s++) y[i][h] += half_of(older[i][s], h) * low(tap[h * WIDTH + s]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        if (WIDTH == 0) made[i] = program.turned(pack(y[i][0] * silu(y[i][2]), y[i][1] * silu(y[i][3])));
        else made[i] = pack(silu(y[i][0]) * y[i][2], silu(y[i][1]) * y[i][3]);
    }
    // By way of shared memory, so that a row's 32 outputs are stored together: of out, then of what is past.
    u32 mine = program.memory + (program.own_row() + program.odd()) * LINE + program.warp * 16 + 2 * program.pair();
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        store4(mine + 8 * i * LINE, made[i]);
#pragma unroll
        for (int s = 0; s < OLDER; s++)
            store4(mine + (OWN * (s + 1) + 8 * i) * LINE, s + 1 < OLDER ? older[i][(s + 1) % SLOTS] : newest[i]);
    }
    program.together();
    // A thread stores eight outputs of every 32nd row.
    int line = threadIdx.x / WARPS, at = program.tile * WARPS * 8 + threadIdx.x % WARPS * 8;
    u32 from = program.memory + line * LINE + threadIdx.x % WARPS * 16;
    i64 to = program.part * OWN + line;
#pragma unroll
    for (int i = 0; i < OWN; i += 32) {
        if (line + i >= OWN || to + i >= rows) continue;
        *(float4_*)(out + (to + i) * N + at) = load_four(from + i * LINE);
#pragma unroll
        for (int s = 0; s < OLDER; s++)
            *(float4_*)(past + ((to + i) * OLDER + s) * N + at) = load_four(from + (OWN * (s + 1) + i) * LINE);
    }
}
