// What CUDA C++ kernels for Hopper share: copies into shared memory, products, what a cluster's programs and
// kernels in a row say to each other. words.cuh comes before.
// Compiled by NVRTC, so nothing is included; cuda.py adds the products, for each width in use.

__device__ __forceinline__ u32 pack(float even, float odd) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
    return pair;
}
__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

__device__ __forceinline__ float power_of_e(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950409f));
    return power;
}
// x / (1 + e^-x); 0 where e^-x is too large for a float.
__device__ __forceinline__ float silu(float x) {
    float power, sigmoid;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950409f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1 + power));
    return x * sigmoid;
}

__device__ __forceinline__ u32 address(const void* shared) {
    return (u32)__cvta_generic_to_shared(shared);
}
// 16 bytes into shared memory, asynchronously; zeros where there is nothing to read.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N groups of copies are under way; wgmma may then read what has come (after a barrier).
template <int N> __device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Before wgmma reads what ordinary stores wrote. It waits for copies too: not where they should overlap.
__device__ __forceinline__ void stores_before_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void store16(u32 to, uint4_ x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store4(u32 to, u32 x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void store_four(u32 to, const float* four) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3]) : "memory");
}
__device__ __forceinline__ u32 load4(u32 from) {
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}

__device__ __forceinline__ float2_ load_two(u32 from) {
    float2_ x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
    return x;
}

// A pointer from here on, as if its value were new.
template <class P> __device__ __forceinline__ void renew(P& pointer) { asm volatile("" : "+l"(pointer)); }
// One more, of which nothing is waited for.
__device__ __forceinline__ void count(i64* counter) { asm volatile("red.global.add.u64 [%0], 1;" ::"l"(counter) : "memory"); }
// A load that stays where it stands, so that what it reads takes no register before.
__device__ __forceinline__ float load_here(const float* from) {
    float x;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from));
    return x;
}
// Brings WIDTH elements of a row into the second cache, and does not wait.
template <int WIDTH> __device__ __forceinline__ void prefetch(const u16* row) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
}
// Brings 32 bytes into the first cache. Its word must be kept somewhere, or the load is left out.
__device__ __forceinline__ u32 touch(const void* from) {
    u32 word;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
}
__device__ __forceinline__ void keep(u32 to, u32 word) {
    asm volatile("st.volatile.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

// Four 8 x 8 matrices of bfloat16, transposed: lane l points to row l % 8 of matrix l / 8, and gets of
// each two entries of column l / 4, those of rows 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row));
}

// One warp's product, d += a b: a is 16 x 16, b 16 x 8, all in registers.
__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving reads or writes of these registers past this line.
template <int N> __device__ __forceinline__ void settle(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void settle(u32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

// ---- barriers in shared memory, of arrivals and bytes

__device__ __forceinline__ void start_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// For copies, and for the cluster once it has met.
__device__ __forceinline__ void barriers_started() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and so many bytes are to come.
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until a phase of this parity is over; the first one's is 0.
__device__ __forceinline__ void await_barrier(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred p;\nAGAIN_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra OVER_%=;\n"
        "bra AGAIN_%=;\nOVER_%=:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// One thread of a whole warp, which the compiler then knows to be alone: else it starts a copy in a loop.
__device__ __forceinline__ bool elected() {
    u32 one;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one));
    return one;
}
// Of so many of the threads.
__device__ __forceinline__ void named_barrier(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int name, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// ---- copies by tensor maps, which the host makes (cuda.py): 128 bytes of each row, swizzled

struct __align__(64) TensorMap { u64 words[16]; };
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void copy_rows(u32 to, const TensorMap& from, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(&from), "r"(barrier), "r"(column), "r"(row) : "memory");
}
// Of a map with four axes: column, row of eight, eight of a block, block.
__device__ __forceinline__ void copy_blocks(u32 to, const TensorMap& from, int column, int block, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %4, %5}], [%2], %6;"
        ::"r"(to), "l"(&from), "r"(barrier), "r"(column), "r"(0), "r"(block), "l"(policy) : "memory");
}
// Of one with five: column, one of two, of four pairs, of four times as many eights, block of 32.
__device__ __forceinline__ void copy_outputs(u32 to, const TensorMap& from, int column, int block, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %4, %4, %5}], [%2], %6;"
        ::"r"(to), "l"(&from), "r"(barrier), "r"(column), "r"(0), "r"(block), "l"(policy) : "memory");
}
// How the second cache keeps what is read once: it goes before all else.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// ---- programs of a cluster

// Without what was stored before, which would take as long as a store: barriers_started() has seen to the barriers.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same place in the shared memory of another one.
__device__ __forceinline__ u32 in_program(u32 place, u32 rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(place), "r"(rank));
    return there;
}
// 16 bytes into another one's memory, and onto its barrier.
__device__ __forceinline__ void send(u32 to, const float* four, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
        ::"r"(to), "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3]), "r"(barrier) : "memory");
}
__device__ __forceinline__ float4_ load_four(u32 from) {
    float4_ x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(from) : "memory");
    return x;
}

// ---- kernels in a row (overlap.py, and kernels.overlap for the host)

__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
