// A token as four lanes hold it in the kernel `pack` of append_cuda.cu, two 16-bit numbers in a word: arithmetic on
// such pairs, the thresholds that give a number its 2-bit code, rotating, loading and storing.

#pragma once

constexpr int RUNS = D / 32, OWN = 8 * RUNS;  // runs of 8 channels, and channels, that a lane holds
constexpr int WORDS = D / 8;                  // 16-bit words of a token's codes

// Two 16-bit numbers of the tokens' dtype in a word.
#define HALVES(name, bf16_form, fp16_form)                                          \
    __device__ __forceinline__ u32 name(u32 a, u32 b) {                             \
        u32 r;                                                                      \
        if (DTYPE == 1)                                                             \
            asm(bf16_form " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));               \
        else                                                                        \
            asm(fp16_form " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));               \
        return r;                                                                   \
    }
HALVES(smaller, "min.NaN.bf16x2", "min.NaN.f16x2")
HALVES(larger, "max.NaN.bf16x2", "max.NaN.f16x2")
__device__ __forceinline__ float first_of(u32 pair) {
    return DTYPE == 1 ? __uint_as_float(pair << 16) : from_half((u16)pair);
}
__device__ __forceinline__ float second_of(u32 pair) {
    return DTYPE == 1 ? __uint_as_float(pair & 0xffff0000u) : from_half((u16)(pair >> 16));
}
__device__ __forceinline__ u32 pair_of(float a, float b) { return DTYPE == 1 ? bf16_pair(a, b) : half_pair(a, b); }
#if DTYPE == 0 || __CUDA_ARCH__ >= 900
HALVES(reaches, "set.ge.u32.bf16x2", "set.ge.u32.f16x2")  // ones where a >= b
#else
__device__ __forceinline__ u32 reaches(u32 a, u32 b) {
    return (first_of(a) >= first_of(b) ? 0xffffu : 0) | (second_of(a) >= second_of(b) ? 0xffff0000u : 0);
}
#endif

// The smallest 16-bit x with fp32(x - low) > step (strict), or >= step, twice in a word; NaN, which no number reaches,
// where low or scale is infinite or NaN.
//
// The quantizer rounds x - low to fp32 before it compares. `step` has 13 significant bits, so its last fp32 bit is 0,
// and a difference halfway between `step` and a neighbour is rounded to `step`. So the rounded difference is > step
// where the exact one is > step + half an ulp, and >= step where the exact one is >= step - half the ulp below it.
// low, step and that half are summed exactly, in two floats, and then rounded up to 16 bits.
__device__ __forceinline__ u32 threshold(float low, float scale, float step, bool strict) {
    const float sum = low + step, part = sum - low, rest = (low - (sum - part)) + (step - part);
    const float half = __uint_as_float(__float_as_uint(step) & 0x7f800000u) * 0x1p-24f;
    float least;
    if (strict) {
        least = __fadd_rd(sum, rest + half) + 0.f;  // -0 becomes 0: the next line adds one to its bits
        least = __int_as_float(__float_as_int(least) + (__float_as_int(least) >= 0 ? 1 : -1));
    } else {
        least = __fadd_ru(sum, rest - (__float_as_uint(step) & 0x7fffffu ? half : .5f * half));
    }
    u32 up;
    if (DTYPE == 1) {
        const int bits = __float_as_int(least);
        up = (u32)(bits >= 0 ? bits + 0xffff : bits) >> 16;
    } else {
        u16 rounded_up;
        asm("cvt.rp.f16.f32 %0, %1;" : "=h"(rounded_up) : "f"(least));
        up = rounded_up;
    }
    if (!(scale < INFINITY && fabsf(low) < INFINITY)) up = 0x7fff;  // NaN
    return up | up << 16;
}

// A token as the model made it -> as it is stored: H x or H((x - c) / s). Pair i holds channel
// 32 * (i / 4) + 8 * lane + 2 * (i % 4) and the next one.
__device__ __forceinline__ void rotate(u32 (&pairs)[OWN / 2], const float (&centre)[OWN], const float (&gain)[OWN],
                                       int lane) {
    float x[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i += 2) x[i] = first_of(pairs[i / 2]), x[i + 1] = second_of(pairs[i / 2]);
    if (ROTATE == 2) {
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = (x[i] - centre[i]) * gain[i];
    }
#pragma unroll
    for (int h = 1; h < D; h *= 2) {
        if (h == 8 || h == 16) {
            const float sign = lane & h / 8 ? -1.f : 1.f;
#pragma unroll
            for (int i = 0; i < OWN; i++) x[i] = fmaf(x[i], sign, __shfl_xor_sync(ALL, x[i], h / 8));
        } else {
            const int step = h < 8 ? h : h / 4;  // registers between the two channels
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                if (i & step) continue;
                const float a = x[i], b = x[(i | step) % OWN];
                x[i] = a + b, x[(i | step) % OWN] = a - b;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i += 2) pairs[i / 2] = pair_of(x[i] * NORM, x[i + 1] * NORM);
}

__device__ __forceinline__ void load(u32 (&pairs)[OWN / 2], const u16 *row) {
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        const uint4 raw = *(const uint4 *)(row + 32 * run);
        pairs[4 * run] = raw.x, pairs[4 * run + 1] = raw.y, pairs[4 * run + 2] = raw.z, pairs[4 * run + 3] = raw.w;
    }
}
__device__ __forceinline__ void store(u16 *row, const u32 (&pairs)[OWN / 2]) {
#pragma unroll
    for (int run = 0; run < RUNS; run++)
        *(uint4 *)(row + 32 * run) =
            make_uint4(pairs[4 * run], pairs[4 * run + 1], pairs[4 * run + 2], pairs[4 * run + 3]);
}
