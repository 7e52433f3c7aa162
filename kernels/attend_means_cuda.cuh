// Means of blocks of keys (kernels/blocks.py). Codes are differences from the mean of their block, so a score with one
// gains the query's product with the mean. A tile of the body is of one block, unless tokens moved; tokens of a tile of
// text may be of any blocks.

#pragma once

#include "attend_wide_cuda.cuh"

constexpr int WIDE_MEANS = 16;  // that a warp takes at a time
static_assert(!KEY_BLOCKS || BLOCK % TILE == 0, "the tokens that count in a tile are of one block");
static_assert(!KEY_MOVED || (KEY_BLOCKS && TILE == 32), "a lane has one token's block");

// Products of the block's queries with the means of WIDE_MEANS blocks from `base` on. Means are read again for the next
// ones, of consecutive tokens some 1000 tokens later.
struct Means {
    const u16 *means;     // of this head
    const int *block_of;  // of this batch row, where tokens moved
    int count;            // of blocks up to the last that this warp reads: later means may never have been written
    int base;
    uint4 rows[LOADS][2];
    float c[NT][4];    // of blocks base + g and base + g + 8, columns 2t and 2t + 1

    __device__ __forceinline__ Means(const Params &p, const Thread &self, const Places &places, const Share &share)
        : means(p.means + (i64)self.bh * p.blocks * D), block_of(p.block_of + (i64)self.batch * p.capacity),
          count(p.blocks), base(-WIDE_MEANS) {
        const int end = TEXT_BITS ? places.stored : min(places.body_end, share.last_tile * TILE);
        if (!KEY_MOVED) count = min((end + BLOCK - 1) / BLOCK, p.blocks);
    }

    // All loads are issued before the first is used.
    __device__ __forceinline__ void load(int first, int g, int t) {
        base = first;
#pragma unroll
        for (int i = 0; i < LOADS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int block = base + g + 8 * half, channel = 8 * (t + 4 * i);
                rows[i][half] = {};
                if (block < count && channel < D)
                    rows[i][half] = __ldg((const uint4 *)(means + (i64)block * D + channel));
            }
    }
    __device__ __forceinline__ void ask(const Queries &queries, const Query &q, int g, int t) {
#pragma unroll
        for (int n = 0; n < NT; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
        ask_rows(c, rows, queries, g, t);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int x = 0; x < CC; x++) c[n][x] *= q.factor[n][x], c[n][2 + x] *= q.factor[n][x];
    }

    // Have the products with the mean of `block`.
    __device__ __forceinline__ void turn_to(int block, const Queries &queries, const Query &q, int g, int t) {
        if ((u32)(block - base) < WIDE_MEANS) return;
        load(block, g, t);
        ask(queries, q, g, t);
    }

    // What the query of column 2t + x of query tile n gains in block base + place.
    __device__ __forceinline__ float of_block(int n, int x, int place, int t) const {
        return __shfl_sync(ALL, place & 8 ? c[n][2 + x] : c[n][x], (place & 7) * 4 + t);
    }

    // Add to the scores of a tile what they gain in `block`, one of those from `base` on.
    __device__ __forceinline__ void add_to(float (&s)[MT][NT][2][CC], int block, int t) const {
        const int place = block - base;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int x = 0; x < CC; x++) {
                const float gain = of_block(n, x, place, t);
#pragma unroll
                for (int m = 0; m < MT; m++) s[m][n][0][x] += gain, s[m][n][1][x] += gain;
            }
    }

    // The same for a tile of tokens that are each in a block of their own: of token `lane`, or -1. Text of consecutive
    // tokens is of one or two.
    __device__ __forceinline__ void add_each(float (&s)[MT][NT][2][CC], int block, const Queries &queries,
                                             const Query &q, const Thread &self) {
        while (const u32 left = __ballot_sync(ALL, block >= 0)) {
            const int one = __shfl_sync(ALL, block, __ffs(left) - 1);
            turn_to(one, queries, q, self.g, self.t);
            const u32 inside = __ballot_sync(ALL, block == one);
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int x = 0; x < CC; x++) {
                    const float gain = of_block(n, x, one - base, self.t);
#pragma unroll
                    for (int m = 0; m < MT; m++)
#pragma unroll
                        for (int half = 0; half < 2; half++)
                            if (inside >> (16 * m + token_of_row(self.g) + 8 * half) & 1) s[m][n][half][x] += gain;
                }
            if (block == one) block = -1;
        }
    }
};
