// total = residual + x W^T + bias, scaled = total * gain, and squares, of each 64 outputs the rows' sums of
// squares of total: what the next product needs to norm what it has made of scaled.
// Constants besides product.cuh's: N. Without bias or counter their pointers are null.

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, 1) product_back(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const float* residual, const u16* bias,
    const u16* gain, float* total, u16* scaled, float* squares, i64* counter, i64 rows) {
    extern __shared__ unsigned char memory[];
    const Program program(address(memory));
    if (program.feeds()) program.start(x, w, program.tile * WARPS);
    // Two neighbouring outputs, by two rows of each eight.
    int n = (program.tile * WARPS + program.warp) * 16 + program.lane / 4 * 2, real = (int)rows - program.row();
    i64 first = (i64)program.row() * N + n;
    u32 gains[2] = {}, shift[2] = {};
    float2_ kept[EIGHTS][2];
    if (program.multiplies()) {
        gains[0] = gain[n], gains[1] = gain[n + 1];
        if (bias) shift[0] = bias[n], shift[1] = bias[n + 1];
    }
    program.ready();
    if (program.feeds()) return program.feed(x, w, program.tile * WARPS);
    program.begin();
    if (counter && blockIdx.x == 0 && threadIdx.x < rows) count(counter + threadIdx.x);
#pragma unroll
    for (int i = 0; i < EIGHTS; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            kept[i][r] = {};
            if (8 * i + r < real) kept[i][r] = *(const float2_*)(residual + first + (8 * i + r) * N);
        }
    float d[ROWS / 2], y[EIGHTS][4];
    program.multiply(d);
    program.add_up(d, y);
    settle(gains), settle(shift);
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        float square[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float even = y[i][r] + low(shift[0]) + kept[i][r].x, odd = y[i][2 + r] + low(shift[1]) + kept[i][r].y;
            square[r] = even * even + odd * odd;
            if (8 * i + r >= real) continue;
            *(float2_*)(total + first + (8 * i + r) * N) = {even, odd};
            *(u32*)(scaled + first + (8 * i + r) * N) = pack(even * low(gains[0]), odd * low(gains[1]));
        }
        program.turn(square[0], square[1]);
        float sum = square[0] + square[1];
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        int of = program.warp * OWN + 8 * i + program.own_row() + program.odd();
        if (program.lane < 8) store4(program.own + 4 * of, __float_as_uint(sum));
    }
    program.together();
    i64 summed = program.part * OWN + threadIdx.x;
    if (threadIdx.x < OWN && summed < rows) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += __uint_as_float(load4(program.own + 4 * (i * OWN + threadIdx.x)));
        squares[program.tile * rows + summed] = sum;
    }
}
