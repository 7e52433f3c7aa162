// Products of queries and weights with 2-bit codes, on tensor cores.

#pragma once

#include "attend_sums_cuda.cuh"

__device__ __forceinline__ u32 four_times(u32 pair) {  // two bf16
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(pair), "r"(0x40804080u), "r"(0x80008000u));
    return d;
}
__device__ __forceinline__ u32 transpose(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
template <bool HALF>
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (HALF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += q (offset + code) for the 16 keys whose rows of words stand in shared memory from `rows` on.
__device__ __forceinline__ void add_products(float (&c)[NT][KG][4], const Query &q, u32 rows, int g, int t) {
    u32 words[2][R];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 row = rows + (8 * half + g) * (W * 2);
        if (CONTIGUOUS) {
            read_shared(words[half], row + 2 * key_word(t, 0));
        } else {
#pragma unroll
            for (int r = 0; r < R; r++) {
                u32 word[1] = {0};
                if (key_word(t, r) < W) read_shared(word, row + 2 * key_word(t, r));
                words[half][r] = word[0];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        HalfCodes upper(words[0][r]), lower(words[1][r]);
#pragma unroll
        for (int j = 0; j < 8; j += 2)
#pragma unroll
            for (int n = 0; n < NT; n++)
                mma<true>(c[n][j * KG / 8], upper[j], lower[j], upper[j + 1], lower[j + 1],
                          q.f[n][8 * r + j], q.f[n][8 * r + j + 1]);
    }
}

// sums.o += b (offset + code) for the 16 values whose rows of words stand in shared memory from `rows` on; sums.p += b.
__device__ __forceinline__ void add_values(Sums &sums, const u32 (&b)[NT][VG][2], u32 rows, int g, int t) {
    constexpr u32 ONES = 0x3F803F80u;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int a = 0; a < VG; a++) mma<false>(sums.p[n][a], ONES, ONES, ONES, ONES, b[n][a][0], b[n][a][1]);
#pragma unroll
    for (int v = 0; v < VR; v++) {
        u32 x[4];
#pragma unroll
        for (int y = 0; y < 4; y++) {
            const u32 from = rows + (4 * y + t) * (W * 2) + 2 * value_word(g, v);
            if (PAIRED) {
                u32 word[1];
                read_shared(word, from);
                x[y] = word[0];
            } else {
                x[y] = value_word(g, v) < W ? read_word(from) : 0;
            }
        }
        if (PAIRED) {
            Bf16Codes x01(__byte_perm(x[0], x[1], 0x5410)), y01(__byte_perm(x[0], x[1], 0x7632));
            Bf16Codes x23(__byte_perm(x[2], x[3], 0x5410)), y23(__byte_perm(x[2], x[3], 0x7632));
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    mma<false>(sums.o[n][8 * v + j], x01[j], y01[j], x23[j], y23[j],
                               b[n][j * VG / 8][0], b[n][j * VG / 8][1]);
        } else {
            Bf16Codes x01(x[0] | x[1] << 16), x23(x[2] | x[3] << 16);
#pragma unroll
            for (int j = 0; j < 8; j += 2)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    mma<false>(sums.o[n][4 * v + j / 2], x01[j], x01[j + 1], x23[j], x23[j + 1],
                               b[n][j * VG / 8][0], b[n][j * VG / 8][1]);
        }
    }
}
