// What hopper.cuh defines, on a CPU, over the same words.cuh: blocks one after another, threads as fibers that take turns
// wherever threads of a warp, a warpgroup or a block meet.
//
// LATE says when asynchronous things happen: copies and products when they are started, or only
// when they are waited for. What a kernel computes must not depend on it. Shared memory begins
// as NaNs.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
#include "words.cuh"

using std::max;

struct Index { u32 x; };
static Index blockIdx, gridDim, threadIdx;
// As on the device, dynamic shared memory does not begin at 0.
constexpr u32 BASE = 1024;
alignas(1024) unsigned char memory[232448];

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
// One wgmma of a warpgroup: its left side, from all threads, and its right side.
struct Multiplication { u32 a[128][4]; u64 b; int n, transposed; bool add; };
struct Warpgroup { std::deque<Multiplication> all; int first = 0; };

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static Group block_group;
static std::vector<Group> warp_groups, warpgroup_groups;
static std::vector<Warpgroup> warpgroups;
static u32 exchanged[1024][12];

static Fiber& own() { return fibers[threadIdx.x]; }
static void yield() {
    const u32 self = threadIdx.x;
    swapcontext(&own().context, &scheduler);
    threadIdx.x = self;
}
static void meet(Group& group) {
    const int meeting = group.meetings;
    if (++group.arrived == group.size) group.arrived = 0, group.meetings++;
    else
        while (group.meetings == meeting) yield();
}
static void meet_warp() { meet(warp_groups[threadIdx.x / 32]); }
static void meet_warpgroup() { meet(warpgroup_groups[threadIdx.x / 128]); }
static void __syncthreads() { meet(block_group); }

template <class T> T __shfl_sync(u32, T value, int from) {
    std::memcpy(exchanged[threadIdx.x], &value, sizeof(T));
    meet_warp();
    T got;
    std::memcpy(&got, exchanged[(threadIdx.x & ~31u) + (from & 31)], sizeof(T));
    meet_warp();
    return got;
}
template <class T> T __shfl_xor_sync(u32 mask, T value, int with) {
    return __shfl_sync(mask, value, (threadIdx.x & 31) ^ with);
}

// ---- numbers

inline u32 bits_of(float x) { u32 bits; std::memcpy(&bits, &x, 4); return bits; }
inline u16 rounded(float x) {
    const u32 bits = bits_of(x);
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
inline unsigned char* at(u32 shared) { return memory + (shared - BASE); }
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

// ---- products

inline void load_matrices(u32 (&x)[4], u32 row) {
    exchanged[threadIdx.x][0] = row;
    meet_warp();
    const u32 warp = threadIdx.x & ~31u, lane = threadIdx.x & 31;
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
    u32* mine = exchanged[threadIdx.x];
    std::copy(a, a + 4, mine), mine[4] = b0, mine[5] = b1;
    meet_warp();
    const u32(*warp)[12] = exchanged + (threadIdx.x & ~31u);
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
    Warpgroup& all = warpgroups[threadIdx.x / 128];
    meet_warpgroup();
    int last = -1;
    for (; !self.products.empty() && self.products.front().group < self.product_groups - N; self.products.pop_front()) {
        last = self.products.front().number;
        multiply_now(all.all[last - all.first], self.products.front().d);
    }
    meet_warpgroup();
    for (; all.first <= last; all.first++) all.all.pop_front();
}
template <int N> __attribute__((noinline)) void settle(float (&x)[N]) { asm volatile("" ::"r"(x) : "memory"); }
template <int N, int TRANSPOSED, bool ADD> __attribute__((noinline)) void wgmma(float* d, const u32 (&a)[4], u64 b) {
    Fiber& self = own();
    Warpgroup& all = warpgroups[threadIdx.x / 128];
    const int number = self.started++;
    if (number - all.first == (int)all.all.size()) all.all.push_back({{}, b, N, TRANSPOSED, ADD});
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
static void run_block(int threads) {
    std::memset(memory, 0xFF, sizeof(memory));
    fibers = std::vector<Fiber>(threads);
    block_group = {threads};
    warp_groups.assign(threads / 32, {32});
    warpgroup_groups.assign(threads / 128, {128});
    warpgroups.assign(threads / 128, {});
    for (int i = 0; i < threads; i++) {
        fibers[i].stack.resize(1 << 16);
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack = {fibers[i].stack.data(), 0, fibers[i].stack.size()};
        fibers[i].context.uc_link = &scheduler;
        makecontext(&fibers[i].context, fiber_main, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (int i = 0; i < threads; i++)
            if (!fibers[i].done) any = true, threadIdx.x = i, swapcontext(&scheduler, &fibers[i].context);
    }
}
static void** arguments;
template <auto KERNEL, class... A, size_t... I> void call(void (*)(A...), std::index_sequence<I...>) {
    KERNEL(*(std::remove_reference_t<A>*)arguments[I]...);
}
template <auto KERNEL, class... A> void launch(void (*kernel)(A...), int grid, int threads) {
    body = [] { call<KERNEL>((void (*)(A...))KERNEL, std::index_sequence_for<A...>()); };
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < (u32)grid; blockIdx.x++) run_block(threads);
}
