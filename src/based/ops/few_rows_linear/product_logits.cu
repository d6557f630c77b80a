// Logits, (x W^T) / rms of up to 128 rows of x, rms given by sums of squares, and of each tile of outputs what
// sampling looks for first. Programs take tiles in turn; copies run ahead from one into the next.
// Constants: ROWS (64 or 128), C, N (outputs), STAGES (steps in flight, and of these FIRST whose weights come
// before x).

constexpr int LANES = 64, STEPS = C / LANES, OUTPUTS = 128, TILES = (N + OUTPUTS - 1) / OUTPUTS;
// Warps that multiply, each 16 of x's rows; bytes of a step's weights, and of all of it.
constexpr int WARPS = ROWS / 16, OF_W = OUTPUTS * 128, STEP = OF_W + ROWS * 128;
constexpr int SCALES = STAGES * STEP, BARRIERS = SCALES + ROWS * 4;
constexpr int SCALED = 1;
// Steps that are asked for ahead are of the first tile.
constexpr int AHEAD = FIRST < STEPS ? FIRST : STEPS;
// Less than any logit, and twice the lowest number of 16 bits.
constexpr float LOWEST = -3.4028234663852886e38f;
constexpr u32 NONE = 0xFF7FFF7Fu;

__device__ __forceinline__ float value(const u32 (&words)[16], int i) { return i % 2 ? high(words[i / 2]) : low(words[i / 2]); }

struct Program {
    u32 memory, full, empty;
    int warp, lane;

    __device__ __forceinline__ Program(u32 given) {
        memory = given + 1023 & ~1023u, full = memory + BARRIERS, empty = full + 8 * STAGES;
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    }

    // Outputs of the last tile end where all end: some are of the one before as well.
    __device__ __forceinline__ static int first_of(int tile) { return tile < TILES - 1 ? tile * OUTPUTS : N - OUTPUTS; }
    __device__ __forceinline__ void weights(const TensorMap& w, const TensorMap& last, int tile, int k, u32 slot) const {
        u32 barrier = full + 8 * slot;
        expect(barrier, STEP);
        bool ends = tile == TILES - 1;
        copy_outputs(memory + slot * STEP, ends ? last : w, k * LANES, ends ? 0 : tile * (OUTPUTS / 32), barrier, read_once());
    }
    __device__ __forceinline__ void start(const TensorMap& x, const TensorMap& w, const TensorMap& last) const {
        if (elected()) {
            for (int s = 0; s < STAGES; s++) start_barrier(full + 8 * s, 1), start_barrier(empty + 8 * s, WARPS);
            barriers_started();
            for (int k = 0; k < AHEAD; k++) weights(w, last, blockIdx.x, k, k);
            let_next_start();
            prefetch_map(x);
        }
        __syncwarp();
    }
    __device__ __forceinline__ void feed(const TensorMap& x, const TensorMap& w, const TensorMap& last) const {
        if (!elected()) return;
        wait_for_previous();
        u32 step = 0, slot = 0, turn = 0;
        for (int tile = blockIdx.x; tile < TILES; tile += gridDim.x)
            for (int k = 0; k < STEPS; k++, step++) {
                if (turn > 0) await_barrier(empty + 8 * slot, turn + 1 & 1);
                if (step >= AHEAD) weights(w, last, tile, k, slot);
                copy_rows(memory + slot * STEP + OF_W, x, k * LANES, 0, full + 8 * slot);
                if (++slot == STAGES) slot = 0, turn++;
            }
    }

    // 1 / rms of x's rows, by a warp of its own.
    __device__ __forceinline__ void find_scales(const float* squares, float eps, i64 rows) const {
        wait_for_previous();
        for (int row = lane; row < rows; row += 32)
            store4(memory + SCALES + 4 * row, __float_as_uint(inverse_rms<C>(squares + row, rows, eps)));
        named_arrive(SCALED, WARPS * 32 + 32);
    }

    // A tile's products, of which a thread has of rows lane / 4 and 8 more of its warp's sixteen, by four times 32
    // outputs, the eight from lane % 4 * 8 on (the map says where these lie).
    __device__ __forceinline__ void multiply(float (&d)[OUTPUTS / 2], u32& slot, u32& parity) const {
        u32 own = OF_W + warp / 4 * (64 * 128);
#pragma unroll 1
        for (int k = 0; k < STEPS; k++) {
            u32 at = memory + slot * STEP, barrier = full + 8 * slot, before = empty + 8 * (slot > 0 ? slot - 1 : STAGES - 1);
            await_barrier(barrier, parity);
            settle(d);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++)
                multiply_128(d, descriptor<1>(at + own + 32 * i, 16, 1024), descriptor<1>(at + 32 * i, 16, 1024), k > 0 || i > 0);
            wgmma_commit();
            if (k > 0) {
                wgmma_wait<1>();
                if (lane == 0) arrive(before);
            }
            if (++slot == STAGES) slot = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        settle(d);
        if (lane == 0) arrive(empty + 8 * (slot > 0 ? slot - 1 : STAGES - 1));
    }

    // A row's 32 outputs of a thread: stored, and of the tile's the largest, the sum of exp of others less it, which
    // one it is, and how many are not finite.
    __device__ __forceinline__ void finish(const float (&d)[OUTPUTS / 2], int r, int tile, float scale, u16* to, float* peaks, bool real) const {
        u32 words[16];
#pragma unroll
        for (int i = 0; i < 16; i++) words[i] = pack(d[4 * i + 2 * r] * scale, d[4 * i + 2 * r + 1] * scale);
        int first = first_of(tile) + lane % 4 * 8, best = N;
        float peak = LOWEST, total = 0, strange = 0;
#pragma unroll
        for (int i = 0; i < 16; i += 4)
            if (real) *(uint4_*)(to + first + 8 * i) = {words[i], words[i + 1], words[i + 2], words[i + 3]};
        // What is not finite counts as 0, and not at all what is of the tile before (all eight, or none).
#pragma unroll
        for (int i = 0; i < 16; i++) {
            bool own = first + i / 4 * 32 >= tile * OUTPUTS;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 bits = 0x7F80u << 16 * h, mask = 0xFFFFu << 16 * h;
                if (own && (words[i] & bits) == bits) strange += 1, words[i] &= ~mask;
            }
            if (!own) words[i] = NONE;
        }
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float x = value(words, i);
            if (x > peak) peak = x, best = first + i / 8 * 32 + i % 8;
        }
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            float other = __shfl_xor_sync(~0u, peak, lanes);
            int its = __shfl_xor_sync(~0u, best, lanes);
            best = other > peak ? its : other < peak ? best : its < best ? its : best;
            peak = other > peak ? other : peak;
            strange += __shfl_xor_sync(~0u, strange, lanes);
        }
#pragma unroll
        for (int i = 0; i < 32; i++) total += power_of_e(value(words, i) - peak);
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) total += __shfl_xor_sync(~0u, total, lanes);
        if (real && lane % 4 == 0) *(float4_*)(peaks + 4 * tile) = {peak, total, __uint_as_float(best), strange};
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 64, 1) product_logits(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap last,
    const float* squares, u16* out, float* peaks, float eps, i64 rows) {
    extern __shared__ unsigned char memory[];
    const Program program(address(memory));
    if (program.warp == WARPS) program.start(x, w, last);
    __syncthreads();
    if (program.warp == WARPS) return program.feed(x, w, last);
    if (program.warp > WARPS) return program.find_scales(squares, eps, rows);
    int row = program.warp * 16 + program.lane / 4;
    u32 slot = 0, parity = 0;
    // What the kernel before reads may not be written before it has ended.
    wait_for_previous();
    named_barrier(SCALED, WARPS * 32 + 32);
    for (int tile = blockIdx.x; tile < TILES; tile += gridDim.x) {
        float d[OUTPUTS / 2];
        program.multiply(d, slot, parity);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            i64 mine = row + 8 * r;
            float scale = __uint_as_float(load4(program.memory + SCALES + 4 * (u32)mine));
            program.finish(d, r, tile, scale, out + mine * N, peaks + mine * (TILES * 4), mine < rows);
        }
    }
}
