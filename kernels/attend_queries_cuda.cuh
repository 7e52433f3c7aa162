// Queries as a block holds them.

#pragma once

#include "attend_tiles_cuda.cuh"

static_assert(ROWS % WARPS == 0, "every warp reads as many rows");
constexpr int PITCH = D + 8;  // numbers from one query row to the next in shared memory

// H x of a row that a warp holds.
__device__ __forceinline__ void rotate(float (&x)[OWN], int lane) {
    hadamard<D>(x, lane);
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] *= NORM;
}

constexpr bool EXACT = BF16 || KEY_UNEVEN;  // tokens at 16 bits are asked with other numbers than codes are

// Channels of the parts of uneven keys (kernels/uneven.py), the last one being as long as the first, and how many of
// them a lane holds.
constexpr int FIRST = D / 4, MIDDLE = D / 2, OWN_FIRST = (FIRST + 31) / 32, OWN_MIDDLE = (MIDDLE + 31) / 32;

// What a lane holds of a query: how many channels, which one at i, D or more for none, and their rotation.
#if KEY_UNEVEN  // a warp holds each part as it holds a whole row
constexpr int OWN_QUERY = 2 * OWN_FIRST + OWN_MIDDLE;
__device__ __forceinline__ int channel_of(int i, int lane) {
    const int part = i < OWN_FIRST ? 0 : i < OWN_FIRST + OWN_MIDDLE ? 1 : 2;
    const int within = lane + 32 * (i - (part == 0 ? 0 : part == 1 ? OWN_FIRST : OWN_FIRST + OWN_MIDDLE));
    const int begin = part == 0 ? 0 : part == 1 ? FIRST : FIRST + MIDDLE;
    return within < (part == 1 ? MIDDLE : FIRST) ? begin + within : D;
}
__device__ __forceinline__ void rotate_query(float (&x)[OWN_QUERY], int lane) {
    float first[OWN_FIRST], middle[OWN_MIDDLE];
#pragma unroll
    for (int i = 0; i < OWN_FIRST; i++) first[i] = x[i];
#pragma unroll
    for (int i = 0; i < OWN_MIDDLE; i++) middle[i] = x[OWN_FIRST + i];
    hadamard<FIRST>(first, lane);
    hadamard<MIDDLE>(middle, lane);
#pragma unroll
    for (int i = 0; i < OWN_FIRST; i++) x[i] = first[i] * FIRST_NORM;
#pragma unroll
    for (int i = 0; i < OWN_MIDDLE; i++) x[OWN_FIRST + i] = middle[i] * MIDDLE_NORM;
}
#else
constexpr int OWN_QUERY = OWN;
__device__ __forceinline__ int channel_of(int i, int lane) { return lane + 32 * i; }
__device__ __forceinline__ void rotate_query(float (&x)[OWN_QUERY], int lane) { rotate(x, lane); }
#endif

// Of this head: its centre, gain or order (row 0, 1, 2).
__device__ __forceinline__ const u16 *row_of_affine(const Params &p, const Thread &self, int row) {
    constexpr i64 COUNT = KEY_UNEVEN ? 3 : 2;
    return p.affine + ((self.batch * COUNT + row) * p.heads + self.bh % p.heads) * D;
}

// What a lane takes of a query row: channels lane, lane + 32, ... as the model made them, their gains, and of uneven keys
// which of the model's channels the stored ones are. Loads depend on nothing that is loaded, so all may be issued early.
struct Raw {
    u16 x[OWN], gain[OWN], order[OWN_QUERY];

    __device__ __forceinline__ void load(const Params &p, const Thread &self, int row) {
        const u16 *from = p.q + ((i64)self.bh * p.rows + self.row0 + row) * D;
        const u16 *gains = row_of_affine(p, self, 1), *orders = row_of_affine(p, self, 2);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int channel = self.lane + 32 * i;
            x[i] = row < self.rows && channel < D ? from[channel] : 0;
            gain[i] = p.affine && channel < D ? gains[channel] : 0;
        }
#pragma unroll
        for (int i = 0; KEY_UNEVEN && i < OWN_QUERY; i++) {
            const int channel = channel_of(i, self.lane);
            order[i] = p.affine && channel < D ? orders[channel] : 0;
        }
    }
};

// The block's queries in shared memory. A row is divided by a power of two, so that it fits the range of fp16 exactly.
struct Queries {
    u16 (&half)[ROWS][PITCH];
    u16 (*native)[PITCH];       // the same in the cache's dtype, by channel
    float (&factor)[ROWS];      // that power of two * scale * log2(e)
    float (&sum)[KG][ROWS];     // sum of q, times factor; symmetric keys need none
    float (&start)[KG][ROWS];   // -sum((offset + KEY_MIDDLE) * half): where scores start

    // Put down what a slot's codes are asked with.
    __device__ __forceinline__ void ask(int row, int slot, u16 h, float (&sums)[KG], float (&starts)[KG]) const {
        half[row][slot] = h;
        const int j = slot / W;
        const float offset = HalfCodes::offset(j) + KEY_MIDDLE;
#pragma unroll
        for (int a = 0; a < KG; a++)
            if (KEY_UNEVEN)  // no branch here, since with it the compiler puts `starts` into local memory
                starts[a] -= j * KG / 8 == a ? offset * from_half(h) : 0.f;
            else if (j * KG / 8 == a)
                sums[a] += from_half(h), starts[a] -= offset * from_half(h);
    }

    // The row times its gains, its channels in the stored order: of uneven keys by way of shared memory, since a load
    // of the channel that the order names would have to wait for the order.
    __device__ __forceinline__ void sort(float (&x)[OWN_QUERY], const Raw &raw, const Params &p, int row,
                                         int lane) const {
        if (KEY_UNEVEN) {
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int channel = lane + 32 * i;
                if (channel < D) native[row][channel] = raw.x[i], half[row][channel] = raw.gain[i];
            }
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < OWN_QUERY; i++) {
            const int channel = channel_of(i, lane), from = p.affine ? (int)from_half(raw.order[i]) : channel;
            const bool there = channel < D;
            const u16 value = !KEY_UNEVEN ? raw.x[i % OWN] : there ? native[row][from] : 0;
            const u16 gain = !KEY_UNEVEN ? raw.gain[i % OWN] : there ? half[row][from] : 0;
            x[i] = from_native(value);
            if (p.affine) x[i] *= from_half(gain);
        }
        if (KEY_UNEVEN) __syncwarp();
    }

    __device__ __forceinline__ void read(const Params &p, const Thread &self, const Raw (&raw)[ROWS / WARPS]) const {
        const int lane = self.lane;
#pragma unroll
        for (int n = 0; n < ROWS / WARPS; n++) {
            const int row = self.warp + WARPS * n;
            float x[OWN_QUERY], top = 0.f, sums[KG] = {}, starts[KG] = {};
            sort(x, raw[n], p, row, lane);
            if (p.rotate) {  // as stored keys are asked, rounded to the cache's dtype
                rotate_query(x, lane);
#pragma unroll
                for (int i = 0; i < OWN_QUERY; i++) x[i] = from_native((u16)native_pair(x[i], 0.f));
            }
#pragma unroll
            for (int i = 0; i < OWN_QUERY; i++) top = fmaxf(top, fabsf(x[i]));
            top = warp_max(top);
            const u32 exponent = __float_as_uint(top) >> 23;  // 0 for zero, 255 for inf
            const float unit = __uint_as_float(min(max(exponent, 1u), 253u) << 23), inverse = 1.f / unit;
#pragma unroll
            for (int i = 0; i < OWN_QUERY; i++) {
                int channel = channel_of(i, lane);
                u16 h = (u16)half_pair(x[i] * inverse, 0.f);
                if (channel < D) {
                    if (KEY_UNEVEN) {  // by the high and the low codes of the first part, and by those of the middle
                        if (i < OWN_FIRST) ask(row, channel, to_half(4.f * from_half(h)), sums, starts);
                        if (i < OWN_FIRST + OWN_MIDDLE) ask(row, channel + FIRST, h, sums, starts);
                    } else {
                        ask(row, channel, h, sums, starts);
                    }
                    if (EXACT) native[row][channel] = (u16)native_pair(x[i] * inverse, 0.f);
                }
            }
#pragma unroll
            for (int a = 0; a < KG; a++)
#pragma unroll
                for (int i = 16; i; i /= 2) {
                    if (!KEY_SYMMETRIC) sums[a] += __shfl_xor_sync(ALL, sums[a], i);
                    starts[a] += __shfl_xor_sync(ALL, starts[a], i);
                }
            if (lane == 0) {
                factor[row] = unit * p.scale;
#pragma unroll
                for (int a = 0; a < KG; a++) {
                    if (!KEY_SYMMETRIC) sum[a][row] = sums[a] * unit * p.scale;
                    start[a][row] = starts[a];
                }
            }
        }
    }
};

// What a lane holds of the block's queries.
struct Query {
    u32 f[NT][PIECES];            // fp16 fragments
    float sum[NT][KG][CC];        // of this lane's columns: sum q, times factor
    float start[NT][KG][CC];      // -sum((offset + KEY_MIDDLE) * q)
    float factor[NT][CC];         // q as stored * factor = q * scale * log2(e)

    __device__ __forceinline__ Query(const Queries &queries, int g, int t) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                int word = key_word(t, i / 8);
                const bool there = word < W && row_of(n, g) >= 0;
                f[n][i] = there ? *(const u32 *)&queries.half[row_of(n, g)][(i % 8) * W + word] : 0;
            }
#pragma unroll
            for (int c = 0; c < CC; c++) {
                const int row = row_of(n, 2 * t + c);
                factor[n][c] = queries.factor[row];
#pragma unroll
                for (int a = 0; a < KG; a++) sum[n][a][c] = queries.sum[a][row], start[n][a][c] = queries.start[a][row];
            }
        }
    }
};

