// A product W x^T of up to 128 rows of x: a cluster has 64 of W's rows, its programs a part of the channels
// each. They add up in each other's memory, and each finishes a part of x's rows. Weights are on their way
// before the kernel before has ended.
// Constants: ROWS, C, PARTS, SCRATCH (bytes of the kernel's own), STAGES (steps in flight, and of these FIRST
// whose weights come before x); MULTIPLY is multiply_<ROWS>.

constexpr int LANES = 64, STEPS = C / PARTS / LANES;
// Warps that multiply, each with a block of 16 of W's rows; bytes of a step's weights, and of all of it.
constexpr int WARPS = 4, OF_W = WARPS * 16 * 128, STEP = OF_W + ROWS * 128;
// Rows that a program finishes, eights of them, and bytes of an eight from one part and of all from others.
constexpr int OWN = ROWS / PARTS, EIGHTS = OWN / 8, SENT = WARPS * 512, OF_PARTS = (PARTS - 1) * EIGHTS * SENT;
constexpr int SUMS = STAGES * STEP, OF_KERNEL = SUMS + (PARTS > 1 ? PARTS * EIGHTS * SENT : 0), BARRIERS = OF_KERNEL + SCRATCH;

// Barriers that have numbers.
constexpr int TOGETHER = 1, SCALES = 2;

struct Program {
    u32 memory, full, empty, sums, own;
    int tile, part, warp, lane;

    __device__ __forceinline__ Program(u32 given) {
        memory = given + 1023 & ~1023u, own = memory + OF_KERNEL;
        full = memory + BARRIERS, empty = full + 8 * STAGES, sums = empty + 8 * STAGES;
        tile = blockIdx.x / PARTS, part = blockIdx.x % PARTS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    }
    // One warp copies, and one may find scales.
    __device__ __forceinline__ bool multiplies() const { return warp < WARPS; }
    __device__ __forceinline__ bool feeds() const { return warp == WARPS; }
    __device__ __forceinline__ bool scales() const { return warp > WARPS; }
    __device__ __forceinline__ void together() const { named_barrier(TOGETHER, WARPS * 32); }
    // Barriers are there, for all threads; others of the cluster may send once all of it has been waited for.
    __device__ __forceinline__ void ready() const {
        __syncthreads();
        if (PARTS > 1) cluster_arrive();
    }
    __device__ __forceinline__ void begin() const {
        if (PARTS > 1) cluster_wait();
        wait_for_previous();
    }
    // Of each eight of x's rows a thread has products of two neighbours, the first of which is row(), by row lane / 4
    // of W's first eight of its block, and by that of the second.
    __device__ __forceinline__ int own_row() const { return lane % 4 * 2; }
    __device__ __forceinline__ int row() const { return part * OWN + own_row(); }
    // Once turned, two numbers are of one row, row() + odd(), and of two rows of W, from row pair() on.
    __device__ __forceinline__ bool odd() const { return lane / 4 % 2; }
    __device__ __forceinline__ int pair() const { return lane / 8 * 2; }
    __device__ __forceinline__ void turn(float& a, float& b) const {
        float other = __shfl_xor_sync(~0u, odd() ? a : b, 4);
        a = odd() ? other : a, b = odd() ? b : other;
    }
    __device__ __forceinline__ u32 turned(u32 two) const {
        return __byte_perm(two, __shfl_xor_sync(~0u, two, 4), odd() ? 0x3276 : 0x5410);
    }

    // Asks for a step's weights, W's rows from a block on, or for its x.
    __device__ __forceinline__ void weights(const TensorMap& w, int block, int k) const {
        if (k >= STEPS) return;
        u32 slot = k % STAGES, barrier = full + 8 * slot;
        expect(barrier, STEP);
        copy_blocks(memory + slot * STEP, w, (part * STEPS + k) * LANES, block, barrier, read_once());
    }
    __device__ __forceinline__ void inputs(const TensorMap& x, int k) const {
        u32 slot = k % STAGES;
        if (k < STEPS) copy_rows(memory + slot * STEP + OF_W, x, (part * STEPS + k) * LANES, 0, full + 8 * slot);
    }
    // The warp that copies asks for the first weights, before the kernel before has ended; then it copies what the
    // others multiply. While many weights are on their way x takes longer to come.
    __device__ __forceinline__ void start(const TensorMap& x, const TensorMap& w, int block) const {
        if (elected()) {
            for (int s = 0; s < FIRST; s++) start_barrier(full + 8 * s, 1);
            barriers_started();
            for (int k = 0; k < FIRST; k++) weights(w, block, k);
            for (int s = FIRST; s < STAGES; s++) start_barrier(full + 8 * s, 1);
            for (int s = 0; s < STAGES; s++) start_barrier(empty + 8 * s, WARPS);
            start_barrier(sums, 1);
            barriers_started();
            expect(sums, OF_PARTS);
            let_next_start();
            prefetch_map(x);
        }
        __syncwarp();
    }
    __device__ __forceinline__ void feed(const TensorMap& x, const TensorMap& w, int block) const {
        if (elected()) {
            wait_for_previous();
            for (int k = 0; k < STAGES; k++) {
                if (k >= FIRST) weights(w, block, k);
                inputs(x, k);
            }
            for (int k = STAGES; k < STEPS; k++) {
                await_barrier(empty + 8 * (k % STAGES), k / STAGES + 1 & 1);
                weights(w, block, k), inputs(x, k);
            }
        }
        __syncwarp();
        if (PARTS > 1) cluster_wait();
    }

    // Of a block lane l has rows l / 4 and 8 more, by rows 2 (l % 4) and 1 more of each eight of x's.
    __device__ __forceinline__ void multiply(float (&d)[ROWS / 2]) const {
        // Addresses go on: from a step's number they would have to be worked out before each product.
        u32 slot = memory, barrier = full, done = 0, parity = 0;
#pragma unroll 1
        for (int k = 0; k < STEPS; k++) {
            await_barrier(barrier, parity);
            settle(d);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++)
                MULTIPLY(d, descriptor<1>(slot + 32 * i, 16, 1024), descriptor<1>(slot + OF_W + 32 * i, 16, 1024), k > 0 || i > 0);
            wgmma_commit();
            if (k > 0) {
                wgmma_wait<1>();
                if (lane == 0) arrive(done);
            }
            done = barrier + 8 * STAGES, barrier += 8, slot += STEP;
            if (barrier == empty) barrier = full, slot = memory, parity ^= 1;
        }
        wgmma_wait<0>();
        settle(d);
    }

    // All parts' sums of this program's rows, always in the same order: y[i] has of eight i two rows by a row of W,
    // and by that of the second eight.
    __device__ __forceinline__ void add_up(const float (&d)[ROWS / 2], float (&y)[EIGHTS][4]) const {
        if (PARTS == 1) {
#pragma unroll
            for (int i = 0; i < 4 * EIGHTS; i++) y[i / 4][i % 4] = d[i];
            return;
        }
        u32 at = memory + SUMS + threadIdx.x * 16;
#pragma unroll
        for (int other = 0; other < PARTS; other++) {
            u32 own = at + part * EIGHTS * SENT, to = in_program(own, other), barrier = in_program(sums, other);
#pragma unroll
            for (int i = 0; i < EIGHTS; i++) {
                const float* four = d + 4 * (EIGHTS * other + i);
                // What is sent takes the way through the cluster even to oneself.
                if (other == part) store_four(own + i * SENT, four);
                else send(to + i * SENT, four, barrier);
            }
        }
        await_barrier(sums, 0);
#pragma unroll
        for (int i = 0; i < EIGHTS; i++) {
            float4_ sum = load_four(at + i * SENT);
#pragma unroll
            for (int p = 1; p < PARTS; p++) {
                float4_ add = load_four(at + (p * EIGHTS + i) * SENT);
                sum.x += add.x, sum.y += add.y, sum.z += add.z, sum.w += add.w;
            }
            y[i][0] = sum.x, y[i][1] = sum.y, y[i][2] = sum.z, y[i][3] = sum.w;
        }
    }

    // What add_up finds, divided by the rms of x's rows, of which x has a norm's gain alone, and two outputs' bias.
    __device__ __forceinline__ void multiply_normed(
        const float* squares, float eps, i64 rows, u32 (&bias)[2], float (&y)[EIGHTS][4]) const {
        begin();
        float d[ROWS / 2];
        multiply(d);
        add_up(d, y);
        named_barrier(SCALES, WARPS * 32 + 32);
        settle(bias);
#pragma unroll
        for (int i = 0; i < EIGHTS; i++) {
            float2_ scale = load_two(own + 4 * (8 * i + own_row()));
#pragma unroll
            for (int h = 0; h < 4; h++) y[i][h] = y[i][h] * (h % 2 ? scale.y : scale.x) + low(bias[h / 2]);
        }
    }

    // 1 / rms of this program's rows into its scratch, by a warp of its own.
    __device__ __forceinline__ void find_scales(const float* squares, float eps, i64 rows) const {
        begin();
        for (int row = lane; row < OWN && part * OWN + row < rows; row += 32)
            store4(own + 4 * row, __float_as_uint(inverse_rms<C>(squares + part * OWN + row, rows, eps)));
        named_arrive(SCALES, WARPS * 32 + 32);
    }
};
