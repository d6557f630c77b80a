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
    int n = at + program.warp * 16 + program.pair();
    float shift[4] = {}, scale[EIGHTS], d[ROWS / 2], y[EIGHTS][4];
#pragma unroll
    for (int h = 0; h < 4; h++) if (bias) shift[h] = low(bias[n + h / 2 * 8 + h % 2]);
    cluster_wait();
    wait_for_previous();
    program.find_scales(squares, eps, rows);
    program.multiply(d);
    program.take_scales(scale);
    program.add_up(d, y);
#pragma unroll
    for (int i = 0; i < EIGHTS; i++)
#pragma unroll
        for (int h = 0; h < 4; h += 2)
            if (program.row(i) < rows)
                *(u32*)(out + (i64)program.row(i) * N + n + 4 * h) =
                    pack(y[i][h] * scale[i] + shift[h], y[i][h + 1] * scale[i] + shift[h + 1]);
}
