// value * silu(gate), or with taps silu(conv(value)) * gate, of (x W^T) / rms + bias: value and gate are the
// halves of W's rows, in blocks of 8 by 8, rms given by sums of squares. `past` moves on by one token.
// Constants besides product.cuh's: N (outputs), WIDTH (taps). Without a bias its pointer is null.

constexpr int OLDER = WIDTH > 1 ? WIDTH - 1 : 0, SLOTS = OLDER > 0 ? OLDER : 1;

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }
__device__ __forceinline__ float half_of(u32 two, int i) { return i ? high(two) : low(two); }

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, 1) product_gated(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const float* squares, const u16* bias,
    const u16* taps, u16* past, u16* out, float eps, i64 rows) {
    extern __shared__ unsigned char memory[];
    const Program program(address(memory));
    if (!program.multiplies()) return program.feed(x, w, program.tile * WARPS);
    int n = (program.tile * WARPS + program.warp) * 8 + program.pair();
    float shift[4] = {}, tap[WIDTH > 0 ? 2 * WIDTH : 1], scale[EIGHTS], d[ROWS / 2], y[EIGHTS][4];
    u32 older[EIGHTS][SLOTS];
#pragma unroll
    for (int h = 0; h < 4; h++) if (bias) shift[h] = low(bias[h / 2 * N + n + h % 2]);
#pragma unroll
    for (int t = 0; t < 2 * WIDTH; t++) tap[t] = low(taps[n * WIDTH + t]);
#pragma unroll
    for (int i = 0; i < EIGHTS; i++)
#pragma unroll
        for (int s = 0; s < OLDER; s++)
            older[i][s] = program.row(i) < rows ? *(const u32*)(past + ((i64)program.row(i) * OLDER + s) * N + n) : 0;
    cluster_wait();
    wait_for_previous();
    program.find_scales(squares, eps, rows);
    program.multiply(d);
    program.take_scales(scale);
    program.add_up(d, y);
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        float value[2], gate[2], made[2];
#pragma unroll
        for (int h = 0; h < 2; h++) value[h] = y[i][h] * scale[i] + shift[h], gate[h] = y[i][2 + h] * scale[i] + shift[2 + h];
        u32 newest = pack(value[0], value[1]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (WIDTH == 0) {
                made[h] = value[h] * silu(gate[h]);
                continue;
            }
            float sum = half_of(newest, h) * tap[(h + 1) * WIDTH - 1];
#pragma unroll
            for (int s = 0; s < OLDER; s++) sum += half_of(older[i][s], h) * tap[h * WIDTH + s];
            made[h] = silu(sum) * gate[h];
        }
        if (program.row(i) >= rows) continue;
        *(u32*)(out + (i64)program.row(i) * N + n) = pack(made[0], made[1]);
#pragma unroll
        for (int s = 0; s < OLDER; s++)
            *(u32*)(past + ((i64)program.row(i) * OLDER + s) * N + n) = s + 1 < OLDER ? older[i][(s + 1) % SLOTS] : newest;
    }
}
