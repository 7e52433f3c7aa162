// Tokens at 16 bits, 16 at a time: of the ring, of the pivots, and this step's own.

#pragma once

#include "attend_products_cuda.cuh"

// A tile of 16 tokens at 16 bits: where the buffers start, and slot and position of the token of lane % 16. The
// position is -1 where the token is not read.
struct Wide {
    const u16 *keys, *values;
    int slot, position;
    int count;  // slots of a head
};

__device__ __forceinline__ Wide ring_tile(const Params &p, const Places &places, int slot) {
    const int start = places.ring_start, end = places.ring_end, count = p.window;
    int behind = (places.end - 1 - slot) % p.window;
    int position = places.end - 1 - (behind < 0 ? behind + p.window : behind);
    if (slot >= count || position < start || position >= end) position = -1;
    return {p.key.ring, p.value.ring, slot, position, count};
}
__device__ __forceinline__ Wide pivot_tile(const Params &p, const Places &places, int slot) {
    const int start = places.ring_start, end = places.ring_end, stored = places.stored, count = p.pivots;
    int position = __shfl_sync(ALL, places.pivot, min(slot, 31));
    if (slot >= count || position >= stored || (position >= start && position < end)) position = -1;
    return {p.key.pivots, p.value.pivots, slot, position, count};
}
__device__ __forceinline__ Wide fresh_tile(const Params &p, const Places &places, int slot) {
    const int end = places.seen_end, count = p.fresh_count;
    int position = places.fresh_start + slot;
    position = slot < count && position < end ? position : -1;
    return {p.key.fresh, p.value.fresh, slot, position, count};
}

constexpr int LOADS = (D + 31) / 32;  // of a lane, 8 channels of a row at 16 bits each

// c += q row, of 16 rows at 16 bits, keys or means of keys. A lane has rows g and g + 8 of the fragment, and of each
// the 8 channels from 8 * (t + 4 * i) on.
__device__ __forceinline__ void ask_rows(float (&c)[NT][4], const uint4 (&rows)[LOADS][2], const Queries &queries,
                                         int g, int t) {
#pragma unroll
    for (int i = 0; i < LOADS; i++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint4 x = {};
            const int channel = 8 * (t + 4 * i);
            if (channel < D && row_of(n, g) >= 0) x = *(const uint4 *)&queries.native[row_of(n, g)][channel];
            const uint4 upper = rows[i][0], lower = rows[i][1];
            mma<!BF16>(c[n], upper.x, lower.x, upper.y, lower.y, x.x, x.y);
            mma<!BF16>(c[n], upper.z, lower.z, upper.w, lower.w, x.z, x.w);
        }
}

// Attend to such a tile.
__device__ __forceinline__ void attend_wide(const Params &p, const Thread &self, const Places &places, const Wide &wide,
                                            const Queries &queries, const Query &q, Sums &sums) {
    const int lane = self.lane, g = self.g, t = self.t, position = wide.position;
    bool seen = position >= 0;
    if (seen && MASK == 1) seen = shown(p, places, position);
    const u32 live = __ballot_sync(ALL, seen) & 0xffffu;
    if (!live) return;
    const u16 *keys = wide.keys + (i64)self.bh * wide.count * D, *values = wide.values + (i64)self.bh * wide.count * D;
    const int base = wide.slot - (lane & 15);

    bool row_live[2];
#pragma unroll
    for (int half = 0; half < 2; half++) row_live[half] = live >> (token_of_row(g) + 8 * half) & 1;
    // All loads are issued before the first is used: 8 channels of two keys at a time, and of four values the channels
    // that this lane accumulates.
    uint4 key[LOADS][2];
    u32 value[OT][PAIRED ? 1 : 2][4];
#pragma unroll
    for (int i = 0; i < LOADS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = token_of_row(g) + 8 * half, channel = 8 * (t + 4 * i);
            key[i][half] = {};
            if (row_live[half] && channel < D)
                key[i][half] = __ldg((const uint4 *)(keys + (i64)(base + row) * D + channel));
        }
#pragma unroll
    for (int y = 0; y < 4; y++) {
        const u16 *from = values + (i64)(base + 4 * y + t) * D;
#pragma unroll
        for (int o = 0; o < OT; o++)
#pragma unroll
            for (int half = 0; half < (PAIRED ? 1 : 2); half++) {
                const int word = value_word(g, PAIRED ? o / 8 : o / 4), j = PAIRED ? o % 8 : 2 * (o % 4) + half;
                value[o][half][y] = 0;
                if (live >> (4 * y + t) & 1 && word < W)
                    value[o][half][y] = PAIRED ? __ldg((const u32 *)(from + j * W + word)) : __ldg(from + j * W + word);
            }
    }

    float s[1][NT][2][CC], c[NT][4] = {};
    ask_rows(c, key, queries, g, t);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int x = 0; x < CC; x++) {
                s[0][n][half][x] = row_live[half] ? c[n][2 * half + x] * q.factor[n][x] : -INFINITY;
                if (MASK == 2) {
                    const int at = __shfl_sync(ALL, position, token_of_row(g) + 8 * half);
                    const int row = self.row0 + row_of(n, 2 * t + x);
                    if (row_live[half] && row < p.rows) s[0][n][half][x] += mask_of(p, places, row, at);
                }
            }
    sums.to_weights(s);
    u32 b[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        b[n][0] = transpose(native_pair(s[0][n][0][0], CC == 2 ? s[0][n][0][CC - 1] : 0.f));
        b[n][1] = transpose(native_pair(s[0][n][1][0], CC == 2 ? s[0][n][1][CC - 1] : 0.f));
    }
#pragma unroll
    for (int o = 0; o < OT; o++) {
        u32 a[4];
        const u32(&x)[4] = value[o][0], (&y)[4] = value[o][PAIRED ? 0 : 1];
        if (PAIRED) {
            a[0] = __byte_perm(x[0], x[1], 0x5410), a[1] = __byte_perm(x[0], x[1], 0x7632);
            a[2] = __byte_perm(x[2], x[3], 0x5410), a[3] = __byte_perm(x[2], x[3], 0x7632);
        } else {
            a[0] = x[0] | x[1] << 16, a[2] = x[2] | x[3] << 16;
            a[1] = y[0] | y[1] << 16, a[3] = y[2] | y[3] << 16;
        }
#pragma unroll
        for (int n = 0; n < NT; n++) mma<!BF16>(sums.o[n][o], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
    }
}
