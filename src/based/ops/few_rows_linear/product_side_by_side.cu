// (x W^T) / rms + bias for up to three W, whose outputs lie side by side, rms given by sums of squares.
// Constants besides product.cuh's: N (all outputs), SECOND, THIRD (where those of the second and third W
// begin; N without). Without a bias its pointer is null.

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, 1) product_side_by_side(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second,
    const __grid_constant__ TensorMap third, const float* squares, const u16* bias, u16* out, float eps, i64 rows) {
    extern __shared__ unsigned char memory[];
    const Program program(address(memory));
    int tile = program.tile, at = tile * 64;
    if (!program.multiplies()) {
        if (at < SECOND) return program.feed(x, first, tile * WARPS);
        return at < THIRD ? program.feed(x, second, (at - SECOND) / 16) : program.feed(x, third, (at - THIRD) / 16);
    }
    int block = at + program.warp * 16, of = block + program.lane / 4;
    int row = program.row(0), real = (int)rows - row;
    u32* to = (u32*)(out + (i64)row * N + block + program.pair());
    u32 shift[2] = {};
    float y[EIGHTS][4];
    if (bias) shift[0] = bias[of], shift[1] = bias[of + 8];
    program.ready();
    program.multiply_normed(squares, eps, rows, shift, y);
#pragma unroll
    for (int i = 0; i < EIGHTS; i++)
#pragma unroll
        for (int h = 0; h < 4; h += 2) {
            u32 both = program.turned(pack(y[i][h], y[i][h + 1]));
            if (8 * i < real) to[4 * (i * N + h / 2)] = both;
        }
}
