// A product W x^T of up to 128 rows of x: a cluster has 64 of W's rows, its programs a part of the channels
// each. They add up in each other's memory, and each finishes a part of x's rows. Weights are on their way
// before the kernel before has ended.
// Constants: ROWS, C, PARTS, STAGES, SCRATCH (bytes of the kernel's own); MULTIPLY is multiply_<ROWS>.

constexpr int LANES = 64, STEPS = C / PARTS / LANES, AHEAD = STAGES < STEPS ? STAGES : STEPS;
// Warps that multiply, each with a block of 16 of W's rows; bytes of a step's weights, and of all of it.
constexpr int WARPS = 4, OF_W = WARPS * 16 * 128, STEP = OF_W + ROWS * 128;
// Rows that a program finishes, eights of them, and bytes of an eight from another part.
constexpr int OWN = ROWS / PARTS, EIGHTS = OWN / 8, SENT = WARPS * 512;
constexpr int SUMS = STAGES * STEP, OF_KERNEL = SUMS + (PARTS - 1) * EIGHTS * SENT, BARRIERS = OF_KERNEL + SCRATCH;

struct Program {
    u32 memory, full, empty, sums, own;
    int tile, part, warp, lane;

    __device__ __forceinline__ Program(u32 given) {
        memory = given + 1023 & ~1023u, own = memory + OF_KERNEL;
        full = memory + BARRIERS, empty = full + 8 * STAGES, sums = empty + 8 * STAGES;
        tile = blockIdx.x / PARTS, part = blockIdx.x % PARTS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (threadIdx.x == 0) {
            for (int s = 0; s < STAGES; s++) start_barrier(full + 8 * s, 1), start_barrier(empty + 8 * s, WARPS);
            start_barrier(sums, 1);
            barriers_started();
            expect(sums, (PARTS - 1) * EIGHTS * SENT);
        }
        __syncthreads();
        cluster_arrive();
    }
    __device__ __forceinline__ bool multiplies() const { return warp < WARPS; }
    __device__ __forceinline__ void together() const { named_barrier(1, WARPS * 32); }
    // The row of an eight of which this thread finishes two neighbours of a block's outputs, the first of them.
    __device__ __forceinline__ int row(int eight) const { return part * OWN + own_row(eight); }
    __device__ __forceinline__ int own_row(int eight) const { return 8 * eight + lane % 4 * 2 + lane / 4 % 2; }
    __device__ __forceinline__ int pair() const { return lane / 8 * 2; }

    // Copies what the others multiply, W's rows from a block on; by one warp.
    __device__ __forceinline__ void feed(const TensorMap& x, const TensorMap& w, int block) const {
        int first = part * STEPS * LANES;
        auto weights = [&](int k) {
            u32 slot = k % STAGES, barrier = full + 8 * slot;
            expect(barrier, STEP);
            copy_blocks(memory + slot * STEP, w, first + k * LANES, block, barrier);
        };
        auto inputs = [&](int k) {
            u32 slot = k % STAGES;
            copy_rows(memory + slot * STEP + OF_W, x, first + k * LANES, 0, full + 8 * slot);
        };
        if (lane == 0) {
            prefetch_map(x);
            for (int k = 0; k < AHEAD; k++) weights(k);
            let_next_start();
            wait_for_previous();
            for (int k = 0; k < AHEAD; k++) inputs(k);
            for (int k = AHEAD; k < STEPS; k++) {
                await_barrier(empty + 8 * (k % STAGES), k / STAGES + 1 & 1);
                weights(k), inputs(k);
            }
        }
        __syncwarp();
        cluster_wait();
    }

    // Of a block lane l has rows l / 4 and 8 more, by rows 2 (l % 4) and 1 more of each eight of x's.
    __device__ __forceinline__ void multiply(float (&d)[ROWS / 2]) const {
#pragma unroll 1
        for (int k = 0; k < STEPS; k++) {
            u32 slot = k % STAGES, of_w = memory + slot * STEP, of_x = of_w + OF_W;
            await_barrier(full + 8 * slot, k / STAGES & 1);
            settle(d);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++)
                MULTIPLY(d, descriptor<1>(of_w + 32 * i, 16, 1024), descriptor<1>(of_x + 32 * i, 16, 1024), k > 0 || i > 0);
            wgmma_commit();
            if (k == 0) continue;
            wgmma_wait<1>();
            if (lane == 0) arrive(empty + 8 * ((k - 1) % STAGES));
        }
        wgmma_wait<0>();
        settle(d);
    }

    // All parts' sums of this program's rows, always in the same order: y[i] has of eight i this thread's row,
    // two neighbouring outputs and those 8 further on. Every thread that multiplies has waited for the cluster.
    __device__ __forceinline__ void add_up(const float (&d)[ROWS / 2], float (&y)[EIGHTS][4]) const {
        u32 at = memory + SUMS + threadIdx.x * 16;
#pragma unroll
        for (int other = 0; other < PARTS; other++) {
            const float* of_other = d + 4 * EIGHTS * other;
            if (other == part) {
#pragma unroll
                for (int i = 0; i < 4 * EIGHTS; i++) y[i / 4][i % 4] = of_other[i];
            } else {
                u32 from = part < other ? part : part - 1, to = in_program(at + from * EIGHTS * SENT, other);
                u32 barrier = in_program(sums, other);
#pragma unroll
                for (int i = 0; i < EIGHTS; i++) send(to + i * SENT, of_other + 4 * i, barrier);
            }
        }
        if (PARTS > 1) await_barrier(sums, 0);
        bool odd = lane / 4 % 2;
#pragma unroll
        for (int i = 0; i < EIGHTS; i++) {
            float4_ sum = {};
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                float4_ add = {y[i][0], y[i][1], y[i][2], y[i][3]};
                if (p != part) add = load_four(at + ((p < part ? p : p - 1) * EIGHTS + i) * SENT);
                sum.x += add.x, sum.y += add.y, sum.z += add.z, sum.w += add.w;
            }
            // An output's two rows become a row's two outputs.
            float near = __shfl_xor_sync(~0u, odd ? sum.x : sum.y, 4), far = __shfl_xor_sync(~0u, odd ? sum.z : sum.w, 4);
            y[i][0] = odd ? near : sum.x, y[i][1] = odd ? sum.y : near;
            y[i][2] = odd ? far : sum.z, y[i][3] = odd ? sum.w : far;
        }
    }

    // 1 / rms of this program's rows, of which x has a gain alone, into its scratch; by threads that multiply.
    __device__ __forceinline__ void find_scales(const float* squares, float eps, i64 rows) const {
        i64 of = part * OWN + threadIdx.x;
        if (threadIdx.x >= OWN || of >= rows) return;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < C / LANES; i++) sum += squares[i * rows + of];
        store4(own + 4 * threadIdx.x, __float_as_uint(rsqrtf(sum / C + eps)));
    }
    __device__ __forceinline__ void take_scales(float (&scale)[EIGHTS]) const {
        together();
#pragma unroll
        for (int i = 0; i < EIGHTS; i++) scale[i] = __uint_as_float(load4(own + 4 * own_row(i)));
    }
};
