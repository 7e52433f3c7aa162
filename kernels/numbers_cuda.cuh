// What attend_cuda.cu and append_cuda.cu share: conversions of 16-bit numbers, and arithmetic across the lanes of a
// warp.

#pragma once

#undef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 ALL = 0xffffffffu;  // lanes of a warp
constexpr u8 TEXT = 1, PIVOT = 2, PADDING = 3;  // classes of tokens, as in kernels/layout.py

// fp16 and bf16 from and to float, rounded to nearest even.
__device__ __forceinline__ float from_half(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ float from_bf16(u16 h) { return __uint_as_float((u32)h << 16); }
__device__ __forceinline__ u16 to_half(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
__device__ __forceinline__ u16 to_bf16(float x) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
// Two numbers in a word, the first in its lower half.
__device__ __forceinline__ u32 half_pair(float first, float second) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ __forceinline__ u32 bf16_pair(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, i));
    return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i; i /= 2) x += __shfl_xor_sync(ALL, x, i);
    return x;
}

// Walsh-Hadamard transform of DIM channels, without its factor. A lane holds channels lane, lane + 32, ...: butterflies
// below 32 are lane exchanges, those above are between a lane's own registers. Where DIM is no power of two, the
// transform is applied to blocks of channels, as long as the largest power of two that divides DIM.
template <int DIM, int COUNT>
__device__ __forceinline__ void hadamard(float (&x)[COUNT], int lane) {
    static_assert(COUNT == (DIM + 31) / 32, "a lane holds every 32nd channel");
    constexpr int ORDER = DIM & -DIM;
#pragma unroll
    for (int h = 1; h < ORDER; h *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (h < 32) {
                const float other = __shfl_xor_sync(ALL, x[i], h);
                x[i] = lane & h ? other - x[i] : x[i] + other;
            } else if (!(i & h / 32)) {
                const float a = x[i], b = x[(i | h / 32) % COUNT];
                x[i] = a + b, x[(i | h / 32) % COUNT] = a - b;
            }
        }
}
