// (x W^T) / rms + bias for up to three W, whose outputs lie side by side, rms given by sums of squares.
// Constants besides product.cuh's: N (all outputs), SECOND, THIRD (where those of the second and third W
// begin; N without). Without a bias its pointer is null.

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 64, 1) product_side_by_side(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second,
    const __grid_constant__ TensorMap third, const float* squares, const u16* bias, u16* out, float eps, i64 rows) {
    extern __shared__ unsigned char memory[];
    const Program program(address(memory));
    int at = program.tile * 64, begins = at < SECOND ? 0 : at < THIRD ? SECOND : THIRD, block = (at - begins) / 16;
    const TensorMap& w = begins == 0 ? first : begins == SECOND ? second : third;
    if (program.feeds()) program.start(x, w, block);
    // Two neighbouring outputs, by two rows of each eight.
    int n = at + program.warp * 16 + program.lane / 4 * 2, real = (int)rows - program.row();
    u16* to = out + (i64)program.row() * N + n;
    u32 shift[2] = {};
    float y[EIGHTS][4];
    if (program.multiplies() && bias) shift[0] = bias[n], shift[1] = bias[n + 1];
    program.ready();
    if (program.feeds()) return program.feed(x, w, block);
    if (program.scales()) return program.find_scales(squares, eps, rows);
    program.multiply_normed(squares, eps, rows, shift, y);
#pragma unroll
    for (int i = 0; i < EIGHTS; i++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (8 * i + r < real) *(u32*)(to + (8 * i + r) * N) = pack(y[i][r], y[i][2 + r]);
}
