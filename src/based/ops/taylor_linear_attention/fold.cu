// Adds full rings of recent keys and values to states whose numerators are in halves (halves.py).
// A warp takes 16 features of a head at a time, and adds a matrix product to them where it has copied them: features
// by tokens by values. A feature is a product of two bfloat16 numbers, which is a sum of two, exactly.
// Constants: H, F, V, WARPS, ROOM (rows among which full rings are looked for at a time).

constexpr int K = 16, RING = 16, FEATURES = 16, TILES = (F + FEATURES - 1) / FEATURES;
// Copies of 16 bytes that a feature's halves of one kind are; bytes of these in shared memory, where 16 more leave its
// neighbours to other banks; and of a warp's memory, and where there keys and values are.
constexpr int COPIES = V / 8, LINE = 16 * COPIES + 16, HALF = FEATURES * LINE, KEYS = 2 * HALF, VALUES = KEYS + RING * 2 * K, OF_WARP = VALUES + RING * LINE;
// Values of a feature that a warp has in registers at a time.
constexpr int GROUP = V <= 112 ? V : V / 2;
// Times 32 rows that are looked at at once.
constexpr int AT_ONCE = 8;

// Where the i-th 16 bytes of 16 rows go.
__device__ __forceinline__ int place_of(int i) { return i / COPIES * LINE + i % COPIES * 16; }

// Feature f of a token's key, in the order of features.py; of one that is not there, something.
__device__ __forceinline__ float feature(u32 keys, int token, int f) {
    u32 key = keys + token * 2 * K;
    int product = f - 1 - K, left = product % K, right = (left + product / K) % K;
    if (f == 0) return 1;
    if (f <= K) return low(load2(key + 2 * (f - 1)));
    return low(load2(key + 2 * left)) * low(load2(key + 2 * right));
}

// Lists rows whose rings are full, in order (programs share what they list), and returns how many; by a warp.
__device__ __forceinline__ u32 find_full(u32 list, const i64* seen, i64 first, i64 end) {
    const int lane = threadIdx.x % 32;
    u32 count = 0;
    for (; first < end; first += 32 * AT_ONCE) {
        bool full[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            i64 row = first + 32 * i + lane;
            full[i] = row < end && seen[row] % RING == RING - 1;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            u32 all = __ballot_sync(~0u, full[i]);
            if (full[i]) store4(list + 4 * (count + __popc(all & (1u << lane) - 1)), first + 32 * i + lane);
            count += __popc(all);
        }
    }
    return count;
}

// To two numbers, whose upper and lower halves are given.
__device__ __forceinline__ void add(u32& upper, u32& lower, float even, float odd) {
    u32 a = __float_as_uint(__uint_as_float(__byte_perm(lower, upper, 0x5410)) + even);
    u32 b = __float_as_uint(__uint_as_float(__byte_perm(lower, upper, 0x7632)) + odd);
    upper = __byte_perm(a, b, 0x7632), lower = __byte_perm(a, b, 0x5410);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) fold_rings(
    u16* numerator, float* denominator, const u16* keys, const u16* values, const i64* seen, i64 rows) {
    extern __shared__ unsigned char memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, token = lane % 4 * 2;
    const u32 start = address(memory), list = start + WARPS * OF_WARP, found = list + 4 * ROOM, mine = start + warp * OF_WARP;
    let_next_start();
    for (i64 first = 0; first < rows; first += ROOM) {
        __syncthreads();
        if (warp == 0) store4(found, find_full(list, seen, first, min(first + ROOM, rows)));
        __syncthreads();
        const int tiles = load4(found) * (H * TILES);
        for (int tile = blockIdx.x * WARPS + warp; tile < tiles; tile += gridDim.x * WARPS) {
            const int f = tile % TILES * FEATURES, head = tile / TILES % H, copies = min(FEATURES, F - f) * COPIES;
            const i64 row = load4(list + 4 * (tile / (H * TILES)));
            u16* upper = numerator + ((row * H + head) * 2 * F + f) * V;
            u16* lower = upper + F * V;
            __syncwarp();
#pragma unroll
            for (int i = lane; i < FEATURES * COPIES; i += 32) {
                const u32 to = mine + place_of(i);
                copy16(to, upper + 8 * i, i < copies), copy16(to + HALF, lower + 8 * i, i < copies);
            }
            // The state is on its way before the newest key and value are there.
            wait_for_previous();
            const u16* key = keys + (row * RING * H + head) * K;
            const u16* value = values + (row * RING * H + head) * V;
            copy16(mine + KEYS + 16 * lane, key + lane / 2 * H * K + lane % 2 * 8, true);
#pragma unroll
            for (int i = lane; i < RING * COPIES; i += 32)
                copy16(mine + VALUES + place_of(i), value + i / COPIES * H * V + i % COPIES * 8, true);
            commit_copies();
            float* norm = denominator + (row * H + head) * F + f + quad;
            float before[2] = {};
#pragma unroll
            for (int r = 0; r < 2; r++)
                if (token == 0 && f + quad + 8 * r < F) before[r] = norm[8 * r];
            await_copies<0>();
            __syncwarp();
            // The left side, by which half of the tokens and of the features: features, and what bfloat16 leaves of them.
            u32 most[4], rest[4];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int own = f + quad + 8 * r;
                float sum = 0;
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float even = feature(mine + KEYS, token + 8 * c, own), odd = feature(mine + KEYS, token + 8 * c + 1, own);
                    u32 both = pack(even, odd);
                    most[r + 2 * c] = both, rest[r + 2 * c] = pack(even - low(both), odd - high(both));
                    sum += even + odd;
                }
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (token == 0 && own < F) norm[8 * r] = before[r] + sum;
            }
            const u32 at = mine + quad * LINE + 2 * token;
            for (int n = 0; n < V; n += GROUP) {
                // All of a group is read before any of it is written, so that no read waits for a write.
                u32 halves[GROUP / 8][4];
#pragma unroll
                for (int i = 0; i < GROUP / 4; i++) {
                    const u32 from = at + 2 * n + i / 2 * 16 + i % 2 * 8 * LINE;
                    halves[i / 2][i % 2 * 2] = load4(from), halves[i / 2][i % 2 * 2 + 1] = load4(from + HALF);
                }
#pragma unroll
                for (int i = 0; i < GROUP / 8; i += 2) {
                    u32 x[4];
                    load_matrices(x, mine + VALUES + lane % 16 * LINE + 2 * n + 16 * (i + lane / 16));
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float d[4] = {};
                        multiply_add(d, rest, x[2 * h], x[2 * h + 1]);
                        multiply_add(d, most, x[2 * h], x[2 * h + 1]);
                        add(halves[i + h][0], halves[i + h][1], d[0], d[1]);
                        add(halves[i + h][2], halves[i + h][3], d[2], d[3]);
                    }
                }
#pragma unroll
                for (int i = 0; i < GROUP / 4; i++) {
                    const u32 to = at + 2 * n + i / 2 * 16 + i % 2 * 8 * LINE;
                    store4(to, halves[i / 2][i % 2 * 2]), store4(to + HALF, halves[i / 2][i % 2 * 2 + 1]);
                }
            }
            __syncwarp();
#pragma unroll
            for (int i = lane; i < FEATURES * COPIES; i += 32) {
                if (i >= copies) break;
                *(float4_*)(upper + 8 * i) = load_four(mine + place_of(i));
                *(float4_*)(lower + 8 * i) = load_four(mine + HALF + place_of(i));
            }
        }
    }
    // A kernel ends when those before it have, whether it had anything to do or not.
    wait_for_previous();
}
