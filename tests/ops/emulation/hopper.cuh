// What hopper.cuh defines, on a CPU, over the same words.cuh: clusters one after another, their threads as fibers that
// take turns wherever threads of a warp, a warpgroup, a block or a cluster meet.
//
// LATE says when asynchronous things happen: copies and products when they are started, or only
// when they are waited for. What a kernel computes must not depend on it. Shared memory begins
// as NaNs.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
#include "words.cuh"

using std::max;

struct Index { u32 x; };
static Index blockIdx, gridDim, threadIdx;
// As on the device, dynamic shared memory does not begin at 0. A place in another program's has its rank, and 1, above.
constexpr u32 BASE = 1024, SIZE = 232448, MOST = 4, RANK = 24;
alignas(1024) unsigned char memory[SIZE];
alignas(1024) static unsigned char memory_of_others[MOST - 1][SIZE];

// ---- fibers

struct Group { int size, arrived = 0, meetings = 0; };
struct Copy { u32 to; const void* from; bool real; int group; };
struct Product { int number; float* d; int group; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    std::deque<Copy> copies;
    std::deque<Product> products;
    int copy_groups = 0, product_groups = 0, started = 0;
};
// One wgmma of a warpgroup: its left side, from all threads or described, and its right side.
struct Multiplication { u32 a[128][4]; u64 b; int n, transposed; bool add; u64 left = 0; };
struct Warpgroup { std::deque<Multiplication> all; int first = 0; };

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
// The fiber that runs, and threads of a program, of which a cluster has several.
static u32 self, threads_of;
static std::vector<Group> block_groups, warp_groups, warpgroup_groups;
static std::map<std::pair<u32, int>, Group> named_groups;
static Group cluster_group;
static std::vector<Warpgroup> warpgroups;
static u32 exchanged[1024][12];

static u32 rank() { return self / threads_of; }
// Programs need not be whole warpgroups.
static u32 warpgroup() { return rank() * ((threads_of + 127) / 128) + threadIdx.x / 128; }
static Fiber& own() { return fibers[self]; }
static u32 first_block;
static void go_on(u32 fiber) { self = fiber, threadIdx.x = fiber % threads_of, blockIdx.x = first_block + rank(); }
static void yield() {
    const u32 before = self;
    swapcontext(&own().context, &scheduler);
    go_on(before);
}
static void meet(Group& group) {
    const int meeting = group.meetings;
    if (++group.arrived == group.size) group.arrived = 0, group.meetings++;
    else
        while (group.meetings == meeting) yield();
}
static void meet_warp() { meet(warp_groups[self / 32]); }
static void meet_warpgroup() { meet(warpgroup_groups[warpgroup()]); }
static void __syncthreads() { meet(block_groups[rank()]); }
static void __syncwarp() { meet_warp(); }
static bool elected() { return threadIdx.x % 32 == 0; }
static void named_barrier(int name, int threads) {
    Group& group = named_groups[{rank(), name}];
    group.size = threads;
    meet(group);
}
static void named_arrive(int name, int threads) {
    Group& group = named_groups[{rank(), name}];
    if (++group.arrived == threads) group.arrived = 0, group.meetings++;
}
// Each thread arrives once, and waits once.
static void cluster_arrive() { cluster_group.arrived++; }
static void cluster_wait() {
    while (cluster_group.arrived < cluster_group.size) yield();
}

template <class T> T __shfl_sync(u32, T value, int from) {
    std::memcpy(exchanged[self], &value, sizeof(T));
    meet_warp();
    T got;
    std::memcpy(&got, exchanged[(self & ~31u) + (from & 31)], sizeof(T));
    meet_warp();
    return got;
}
template <class T> T __shfl_xor_sync(u32 mask, T value, int with) {
    return __shfl_sync(mask, value, (threadIdx.x & 31) ^ with);
}

// ---- numbers

inline float power_of_e(float x) { return std::exp(x); }
inline float silu(float x) { return x / (1 + std::exp(-x)); }

inline u16 rounded(float x) {
    const u32 bits = __float_as_uint(x);
    if (x != x) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline u32 __byte_perm(u32 a, u32 b, u32 which) {
    const u64 both = (u64)b << 32 | a;
    u32 made = 0;
    for (int i = 0; i < 4; i++) made |= (u32)(both >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
    return made;
}
inline u32 pack(float even, float odd) { return (u32)rounded(odd) << 16 | rounded(even); }
inline u32 times(u32 a, u32 b) { return pack(low(a) * low(b), high(a) * high(b)); }

// ---- memory

inline u32 address(const void* shared) { return BASE + (u32)((const unsigned char*)shared - memory); }
inline u32 in_program(u32 place, u32 of) { return place | (of + 1) << RANK; }
inline unsigned char* at(u32 shared) {
    const u32 of = shared >> RANK ? (shared >> RANK) - 1 : rank();
    return (of ? memory_of_others[of - 1] : memory) + ((shared & (1 << RANK) - 1) - BASE);
}
inline void copy_now(const Copy& copy) {
    if (copy.real) std::memcpy(at(copy.to), copy.from, 16);
    else std::memset(at(copy.to), 0, 16);
}
inline void copy16(u32 to, const void* from, bool real) {
    const Copy copy = {to, from, real, own().copy_groups};
    if (LATE) own().copies.push_back(copy);
    else copy_now(copy);
}
inline void commit_copies() { own().copy_groups++; }
template <int N> void await_copies() {
    Fiber& self = own();
    for (; !self.copies.empty() && self.copies.front().group < self.copy_groups - N; self.copies.pop_front())
        copy_now(self.copies.front());
}
inline void stores_before_wgmma() {}
inline void store16(u32 to, uint4_ x) { std::memcpy(at(to), &x, 16); }
inline void store4(u32 to, u32 x) { std::memcpy(at(to), &x, 4); }
inline u32 load4(u32 from) { u32 x; std::memcpy(&x, at(from), 4); return x; }
template <class P> void renew(P&) {}
inline float load_here(const float* from) { return *from; }
template <int WIDTH> void prefetch(const u16*) {}
inline u32 touch(const void* from) { return *(const u32*)from; }
inline void keep(u32 to, u32 word) { store4(to, word); }

// ---- barriers, and what arrives there

struct Barrier { int arrivals = 0, pending = 0, phase = 0; i64 bytes = 0; std::vector<std::function<void()>> late; };
static std::map<const void*, Barrier> barriers;
inline void advance(Barrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.arrivals, barrier.phase++;
}
inline void start_barrier(u32 barrier, u32 arrivals) { barriers[at(barrier)] = {(int)arrivals, (int)arrivals}; }
inline void barriers_started() {}
inline void arrive(u32 barrier) { barriers[at(barrier)].pending--, advance(barriers[at(barrier)]); }
inline void expect(u32 barrier, u32 bytes) { barriers[at(barrier)].bytes += bytes, arrive(barrier); }
inline void await_barrier(u32 barrier, u32 parity) {
    Barrier& of = barriers[at(barrier)];
    while ((of.phase & 1u) == parity) {
        for (auto late = std::exchange(of.late, {}); auto& happen : late) happen();
        if ((of.phase & 1u) == parity) yield();
    }
}
// Something that brings bytes, now or later.
inline void bring(u32 barrier, i64 bytes, std::function<void()> write) {
    Barrier& of = barriers[at(barrier)];
    auto happen = [&of, bytes, write] { write(), of.bytes -= bytes, advance(of); };
    if (LATE) of.late.push_back(happen);
    else happen();
}

// As emulation/__init__.py fills it: a pointer, five sizes, four strides in bytes, five sizes of a box.
struct __align__(64) TensorMap { u64 words[16]; };
inline void prefetch_map(const TensorMap&) {}
inline void copy_box(u32 to, const TensorMap& map, const i64 (&first)[5], u32 barrier) {
    const u64 *size = map.words + 1, *stride = size + 5, *box = stride + 4;
    unsigned char* place = at(to);
    const u64 base = (u64)to;  // swizzled by its address
    bring(barrier, box[0] * box[1] * box[2] * box[3] * box[4] * 2, [=] {
        u64 row = 0;
        for (u64 d = 0; d < box[4]; d++)
        for (u64 c = 0; c < box[3]; c++)
            for (u64 b = 0; b < box[2]; b++)
                for (u64 a = 0; a < box[1]; a++, row++)
                    for (u64 chunk = 0; chunk < box[0] / 8; chunk++) {
                        const bool real = first[1] + a < size[1] && first[2] + b < size[2] && first[3] + c < size[3] && first[4] + d < size[4] && first[0] + 8 * chunk < size[0];
                        const u64 from = (first[0] + 8 * chunk) * 2 + (first[1] + a) * stride[0] + (first[2] + b) * stride[1] + (first[3] + c) * stride[2] + (first[4] + d) * stride[3];
                        u64 shared = base + row * 128 + chunk * 16;
                        shared ^= (shared >> 7 & 7) << 4;
                        if (real) std::memcpy(place + (shared - base), (const char*)map.words[0] + from, 16);
                        else std::memset(place + (shared - base), 0, 16);
                    }
    });
}
inline void copy_rows(u32 to, const TensorMap& from, int column, int row, u32 barrier) { copy_box(to, from, {column, row, 0, 0, 0}, barrier); }
inline u64 read_once() { return 0; }
inline void copy_blocks(u32 to, const TensorMap& from, int column, int block, u32 barrier, u64) { copy_box(to, from, {column, 0, 0, block, 0}, barrier); }
inline void copy_outputs(u32 to, const TensorMap& from, int column, int block, u32 barrier, u64) { copy_box(to, from, {column, 0, 0, 0, block}, barrier); }
inline void send(u32 to, const float* four, u32 barrier) {
    float4_ x = {four[0], four[1], four[2], four[3]};
    unsigned char* place = at(to);
    bring(barrier, 16, [=] { std::memcpy(place, &x, 16); });
}
inline void count(i64* counter) { ++*counter; }
inline void store_four(u32 to, const float* four) { std::memcpy(at(to), four, 16); }
inline float2_ load_two(u32 from) { float2_ x; std::memcpy(&x, at(from), 8); return x; }
inline float4_ load_four(u32 from) { float4_ x; std::memcpy(&x, at(from), 16); return x; }
inline void let_next_start() {}
inline void wait_for_previous() {}

// ---- products

inline void load_matrices(u32 (&x)[4], u32 row) {
    exchanged[self][0] = row;
    meet_warp();
    const u32 warp = self & ~31u, lane = threadIdx.x & 31;
    for (u32 i = 0; i < 4; i++) {
        u16 two[2];
        for (u32 n = 0; n < 2; n++)
            std::memcpy(&two[n], at(exchanged[warp + 8 * i + 2 * (lane & 3) + n][0]) + 2 * (lane >> 2), 2);
        x[i] = (u32)two[1] << 16 | two[0];
    }
    meet_warp();
}
// Entry (row g + 8 r, column k) of a left side whose registers are by[lane of the quad].
inline float left(const u32 (*by)[12], int g, int r, int k) {
    const u32 pair = by[4 * g + (k & 7) / 2][r + (k >= 8 ? 2 : 0)];
    return k & 1 ? high(pair) : low(pair);
}
inline void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32* mine = exchanged[self];
    std::copy(a, a + 4, mine), mine[4] = b0, mine[5] = b1;
    meet_warp();
    const u32(*warp)[12] = exchanged + (self & ~31u);
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const u32 pair = warp[4 * (2 * t + (i & 1)) + (k & 7) / 2][4 + k / 8];
            d[i] += left(warp, g, i >> 1, k) * (k & 1 ? high(pair) : low(pair));
        }
    meet_warp();
}

// Entry (k, n) of the right side that is described.
inline float right(u64 b, bool transposed, int k, int n) {
    const u32 outer = (b >> 16 & 0x3FFF) << 4, group = (b >> 32 & 0x3FFF) << 4;
    const int swizzle = b >> 62, width = swizzle == 1 ? 64 : swizzle == 3 ? 16 : 8;
    u32 place = (b & 0x3FFF) << 4;
    if (transposed && swizzle == 0) place += n / 8 * group + n % 8 * 2 + k / 8 * outer + k % 8 * 16;
    else if (transposed) place += n / width * outer + n % width * 2 + k / 8 * group + k % 8 * width * 2;
    else place += n / 8 * group + n % 8 * width * 2 + k * 2;
    if (swizzle == 1) place ^= (place >> 7 & 7) << 4;
    if (swizzle == 3) place ^= (place >> 7 & 1) << 4;
    u16 bits;
    std::memcpy(&bits, at(place), 2);
    return __uint_as_float((u32)bits << 16);
}
inline void multiply_now(const Multiplication& by, float* d) {
    const int thread = threadIdx.x & 127, t = thread & 3, quad = thread & ~3;
    for (int r = 0; r < 2; r++) {
        float row[16];
        for (int k = 0; k < 16; k++) {
            const u32 pair = by.a[quad + (k & 7) / 2][r + (k >= 8 ? 2 : 0)];
            row[k] = k & 1 ? high(pair) : low(pair);
            if (by.left) row[k] = right(by.left, false, k, thread / 32 * 16 + thread % 32 / 4 + 8 * r);
        }
        for (int j = 0; j < by.n / 8; j++)
            for (int i = 0; i < 2; i++) {
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += row[k] * right(by.b, by.transposed, k, 8 * j + 2 * t + i);
                float& to = d[4 * j + 2 * r + i];
                to = by.add ? to + sum : sum;
            }
    }
}
inline void wgmma_fence() {}
inline void wgmma_commit() { own().product_groups++; }
template <int N> __attribute__((noinline)) void wgmma_wait() {
    Fiber& self = own();
    Warpgroup& all = warpgroups[warpgroup()];
    meet_warpgroup();
    int last = -1;
    for (; !self.products.empty() && self.products.front().group < self.product_groups - N; self.products.pop_front()) {
        last = self.products.front().number;
        multiply_now(all.all[last - all.first], self.products.front().d);
    }
    meet_warpgroup();
    for (; all.first <= last; all.first++) all.all.pop_front();
}
template <class T, int N> __attribute__((noinline)) void settle(T (&x)[N]) { asm volatile("" ::"r"(x) : "memory"); }
template <int N> __attribute__((noinline)) void wgmma(float* d, const u32 (&a)[4], u64 left, u64 b, int transposed, bool add) {
    Fiber& self = own();
    Warpgroup& all = warpgroups[warpgroup()];
    const int number = self.started++;
    if (number - all.first == (int)all.all.size()) all.all.push_back({{}, b, N, transposed, add, left});
    std::copy(a, a + 4, all.all[number - all.first].a[threadIdx.x & 127]);
    if (LATE) {
        self.products.push_back({number, d, self.product_groups});
        return;
    }
    meet_warpgroup();
    multiply_now(all.all[number - all.first], d);
    meet_warpgroup();
    if (all.first == number) all.all.pop_front(), all.first++;
}

// ---- launches

static void (*body)();
static void fiber_main() {
    body();
    own().done = true;
    swapcontext(&own().context, &scheduler);
}
static void run_cluster(int programs, int threads) {
    std::memset(memory, 0xFF, sizeof(memory));
    std::memset(memory_of_others, 0xFF, SIZE * (programs - 1));
    barriers.clear(), named_groups.clear();
    threads_of = threads;
    fibers = std::vector<Fiber>(programs * threads);
    cluster_group = {programs * threads};
    block_groups.assign(programs, {threads});
    warp_groups.assign(programs * threads / 32, {32});
    warpgroup_groups.assign(programs * ((threads + 127) / 128), {128});
    warpgroups.assign(programs * ((threads + 127) / 128), {});
    for (Fiber& fiber : fibers) {
        fiber.stack.resize(1 << 16);
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, fiber_main, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (u32 i = 0; i < fibers.size(); i++)
            if (!fibers[i].done) any = true, go_on(i), swapcontext(&scheduler, &fibers[i].context);
    }
}
static void** arguments;
template <auto KERNEL, class... A, size_t... I> void call(void (*)(A...), std::index_sequence<I...>) {
    KERNEL(*(std::remove_reference_t<A>*)arguments[I]...);
}
template <auto KERNEL, class... A> void launch(void (*kernel)(A...), int grid, int threads, int cluster) {
    body = [] { call<KERNEL>((void (*)(A...))KERNEL, std::index_sequence_for<A...>()); };
    gridDim.x = grid;
    for (first_block = 0; first_block < (u32)grid; first_block += cluster) run_cluster(cluster, threads);
}
