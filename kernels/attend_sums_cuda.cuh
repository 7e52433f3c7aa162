// What warps sum up for the queries: online softmax, and the merge of the warps' sums.

#pragma once

#include "attend_queries_cuda.cuh"

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rotate a finished row back and write it out. A whole warp calls this; `row` is in shared memory.
__device__ __forceinline__ void write_restored(u16 *out, const float *row, int lane) {
    float x[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = lane + 32 * i < D ? row[lane + 32 * i] : 0.f;
    rotate(x, lane);
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (lane + 32 * i < D) out[lane + 32 * i] = (u16)native_pair(x[i], 0.f);
}

// What a warp has accumulated: for its columns 2t, 2t + 1 of every query tile.
struct Sums {
    float o[NT][OT][4];         // channels of rows g and g + 8, columns 2t and 2t + 1
    float m[NT][CC], l[NT][CC]; // running maximum; sum of p over this lane's tokens
    float low[NT][VG][CC];      // sum of p * minimum, over this lane's tokens; 0 where values are symmetric
    float p[NT][VG][4];         // sum of p' = p * scale as rounded (rows are equal)

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int o_ = 0; o_ < OT; o_++) o[n][o_][0] = o[n][o_][1] = o[n][o_][2] = o[n][o_][3] = 0.f;
#pragma unroll
            for (int c = 0; c < CC; c++) m[n][c] = -INFINITY, l[n][c] = 0.f;
#pragma unroll
            for (int a = 0; a < VG; a++) {
                low[n][a][0] = low[n][a][CC - 1] = 0.f;
                p[n][a][0] = p[n][a][1] = p[n][a][2] = p[n][a][3] = 0.f;
            }
        }
    }

    // Take the scores' maximum into m and scale what was summed so far; scores come out as weights, exp(score - m).
    // s[tile][query tile][half][column]: tokens of rows g and g + 8
    template <int COUNT>
    __device__ __forceinline__ void to_weights(float (&s)[COUNT][NT][2][CC]) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float top[CC], shift[CC], alpha[CC];
            bool grown = false;
#pragma unroll
            for (int c = 0; c < CC; c++) {
                top[c] = m[n][c];
#pragma unroll
                for (int i = 0; i < COUNT; i++) top[c] = fmaxf(top[c], fmaxf(s[i][n][0][c], s[i][n][1][c]));
                top[c] = fmaxf(top[c], __shfl_xor_sync(ALL, top[c], 4));
                top[c] = fmaxf(top[c], __shfl_xor_sync(ALL, top[c], 8));
                top[c] = fmaxf(top[c], __shfl_xor_sync(ALL, top[c], 16));
                shift[c] = top[c] == -INFINITY ? 0.f : top[c];
                grown |= top[c] != m[n][c];
            }
            if (__any_sync(ALL, grown)) {
#pragma unroll
                for (int c = 0; c < CC; c++) {
                    alpha[c] = exp2_fast(m[n][c] - shift[c]);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
#pragma unroll
                        for (int i = 0; i < OT; i++) o[n][i][2 * half + c] *= alpha[c];
#pragma unroll
                        for (int a = 0; a < VG; a++) p[n][a][2 * half + c] *= alpha[c];
                    }
#pragma unroll
                    for (int a = 0; a < VG; a++) low[n][a][c] *= alpha[c];
                    l[n][c] *= alpha[c], m[n][c] = top[c];
                }
            }
#pragma unroll
            for (int i = 0; i < COUNT; i++)
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int c = 0; c < CC; c++) {
                        s[i][n][half][c] = exp2_fast(s[i][n][half][c] - shift[c]);
                        l[n][c] += s[i][n][half][c];
                    }
        }
    }
};

__device__ __forceinline__ float sum_over_rows(float x) {  // of a fragment
#pragma unroll
    for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(ALL, x, i);
    return x;
}

// Merge what the block's warps have summed up, in `shared`, where their rings were. The result is the output where
// there is one split, else a part for `combine`.
__device__ __forceinline__ void merge(const Params &p, const Thread &self, const Sums &sums, u8 *shared) {
    __shared__ float all_m[WARPS][ROWS], all_l[WARPS][ROWS];
    float(*all_o)[ROWS][D] = (float(*)[ROWS][D])shared;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < CC; c++) {
            const int row = row_of(n, 2 * self.t + c);
            float l = sum_over_rows(sums.l[n][c]), low[VG];
#pragma unroll
            for (int a = 0; a < VG; a++) low[a] = VALUE_SYMMETRIC ? 0.f : sum_over_rows(sums.low[n][a][c]);
            if (row < self.rows) {
                if (self.g == 0) all_m[self.warp][row] = sums.m[n][c], all_l[self.warp][row] = l;
#pragma unroll
                for (int o = 0; o < OT; o++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int j = PAIRED ? o % 8 : 2 * (o % 4) + half, a = j * VG / 8;
                        int word = PAIRED ? value_word(self.g, o / 8) + half : value_word(self.g, o / 4);
                        const float offset = Bf16Codes::offset(j) + VALUE_MIDDLE;
                        float x = sums.o[n][o][2 * half + c] - offset * sums.p[n][a][c];
                        if (!VALUE_SYMMETRIC) x += low[a];
                        if (word < W) all_o[self.warp][row][j * W + word] = x;
                    }
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < self.rows * D; i += 32 * WARPS) {
        const int row = i / D, channel = i % D;
        float top = -INFINITY, l = 0.f, o = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, all_m[w][row]);
        const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float weight = exp2_fast(all_m[w][row] - shift);
            l += weight * all_l[w][row], o += weight * all_o[w][row][channel];
        }
        const i64 place = (i64)self.bh * p.rows + self.row0 + row;
        if (p.splits == 1) {
            o = l == 0.f ? 0.f : o / l;
            if (p.restore) all_o[0][row][channel] = o;  // no other thread reads this element
            else p.out[place * D + channel] = (u16)native_pair(o, 0.f);
        } else {
            p.part_o[(place * p.splits + self.split) * D + channel] = o;
            float *ml = p.part_ml + (place * p.splits + self.split) * 2;
            if (channel == 0) ml[0] = top, ml[1] = l;
        }
    }
    if (p.splits == 1 && p.restore) {
        __syncthreads();
        for (int row = self.warp; row < self.rows; row += WARPS)
            write_restored(p.out + ((i64)self.bh * p.rows + self.row0 + row) * D, all_o[0][row], self.lane);
    }
}
