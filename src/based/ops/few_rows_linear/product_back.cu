// total = residual + x W^T + bias, scaled = total * gain, and squares, of each 64 outputs the rows' sums of
// squares of total: what the next product needs to norm what it has made of scaled.
// Constants besides product.cuh's: N. Without bias or counter their pointers are null.

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, 1) product_back(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const float* residual, const u16* bias,
    const u16* gain, float* total, u16* scaled, float* squares, i64* counter, i64 rows) {
    extern __shared__ unsigned char memory[];
    const Program program(address(memory));
    if (!program.multiplies()) return program.feed(x, w, program.tile * WARPS);
    int n = (program.tile * WARPS + program.warp) * 16 + program.pair();
    int row = program.row(0), real = (int)rows - row;
    i64 first = (i64)row * N + n;
    u32 gains[2], shift[2] = {};
    float kept[EIGHTS][4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        gains[h] = *(const u32*)(gain + n + 8 * h);
        if (bias) shift[h] = *(const u32*)(bias + n + 8 * h);
    }
    program.ready();
    program.wait();
#pragma unroll
    for (int i = 0; i < EIGHTS; i++)
#pragma unroll
        for (int h = 0; h < 4; h += 2) {
            float2_ two = {};
            if (8 * i < real) two = *(const float2_*)(residual + first + 8 * i * N + 4 * h);
            kept[i][h] = two.x, kept[i][h + 1] = two.y;
        }
    float d[ROWS / 2], y[EIGHTS][4];
    program.multiply(d);
    program.add_up(d, y);
    settle(gains), settle(shift);
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        float square = 0;
        program.turn(y[i][0], y[i][1]), program.turn(y[i][2], y[i][3]);
#pragma unroll
        for (int h = 0; h < 4; h += 2) {
            i64 at = first + 8 * i * N + 4 * h;
            float even = y[i][h] + low(shift[h / 2]) + kept[i][h], odd = y[i][h + 1] + high(shift[h / 2]) + kept[i][h + 1];
            square += even * even + odd * odd;
            if (8 * i < real) *(float2_*)(total + at) = {even, odd};
            if (8 * i < real) *(u32*)(scaled + at) = pack(even * low(gains[h / 2]), odd * high(gains[h / 2]));
        }
        square += __shfl_xor_sync(~0u, square, 8);
        square += __shfl_xor_sync(~0u, square, 16);
        if (program.lane < 8) store4(program.own + 4 * (program.warp * OWN + program.own_row(i)), __float_as_uint(square));
    }
    program.together();
    i64 summed = program.part * OWN + threadIdx.x;
    if (threadIdx.x < OWN && summed < rows) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += __uint_as_float(load4(program.own + 4 * (i * OWN + threadIdx.x)));
        squares[program.tile * rows + summed] = sum;
    }
    if (counter && blockIdx.x == 0 && threadIdx.x < rows) counter[threadIdx.x] += 1;
}
