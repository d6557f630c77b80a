// What kernels in CUDA C++ and their emulation on a CPU have in common: types, words of bits, and a norm's
// division.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct __align__(8) uint2_ { u32 x, y; };
struct __align__(8) float2_ { float x, y; };
struct __align__(16) uint4_ { u32 x, y, z, w; };
struct __align__(16) float4_ { float x, y, z, w; };

// Pairs of bfloat16 in one register, the even column in the low half.
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ __forceinline__ u32 pack(float even, float odd);
// Rounded once.
__device__ __forceinline__ u32 added(u32 a, u32 b) { return pack(low(a) + low(b), high(a) + high(b)); }

// A matrix in shared memory as wgmma wants it described. SWIZZLE: 1 for rows of 128 bytes, 3 for
// 32. `outer` and `group` are bytes: between panels of columns, and between groups of 8 rows.
template <int SWIZZLE> __device__ __forceinline__ u64 descriptor(u32 shared, u32 outer, u32 group) {
    return (u64)(shared >> 4 & 0x3FFF) | (u64)(outer >> 4) << 16 | (u64)(group >> 4) << 32 | (u64)SWIZZLE << 62;
}

// 1 / rms of C channels, of whose sums of squares, of 64 each, there is one every `rows`.
template <int C> __device__ __forceinline__ float inverse_rms(const float* squares, i64 rows, float eps) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < C / 64; i++, squares += rows) sum += *squares;
    return rsqrtf(sum * (1.f / C) + eps);
}
