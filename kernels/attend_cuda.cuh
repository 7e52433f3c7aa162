// The shapes that attend_cuda.cu is compiled for, its arguments, and what part of the work a thread has.

#pragma once

#include "numbers_cuda.cuh"

constexpr int D = HEAD_DIM, W = D / 8;               // W: int16 words of a token
constexpr int KG = KEY_GROUPS, VG = VALUE_GROUPS;    // scales of a token
constexpr int ROWS = 4 * CC * NT;                    // query rows of a block; with CC 1 they take every other column
constexpr int R = (W + 7) / 8;                       // 32-bit registers a lane holds of a key
constexpr int PIECES = 8 * R;                        // channel pairs a lane holds of a key
constexpr bool CONTIGUOUS = W % 8 == 0;              // a lane's words of a key lie side by side
constexpr bool PAIRED = W % 16 == 0;                 // a lane takes two words of a value, else one
constexpr int VR = PAIRED ? W / 16 : (W + 7) / 8;    // loads a lane makes of a value
constexpr int OT = PAIRED ? 8 * VR : 4 * VR;         // output tiles of 16 channels
constexpr int TILE = 16 * MT;                        // tokens
constexpr int WIDE_TILE = 16;                        // tokens of a tile that is kept at 16 bits
constexpr int OWN = (D + 31) / 32;                   // channels lane, lane + 32, ... that a lane holds of a warp's row
static_assert(!TEXT_BITS || TEXT_BITS == 4, "two bits above and two below");
static_assert(!TEXT_BITS || TILE == 32, "a lane has one token's position");
static_assert(!TEXT_BITS || (KG == VG && !KEY_SYMMETRIC && !VALUE_SYMMETRIC), "text is gathered in whole words");
static_assert(!KEY_UNEVEN || (KG == 2 && KEY_SYMMETRIC), "see kernels/uneven.py");

// Bytes of a token's range, and what lies between the levels of symmetric codes and the codes.
constexpr int KEY_RANGE = KG * (KEY_SYMMETRIC ? 2 : 4), VALUE_RANGE = VG * (VALUE_SYMMETRIC ? 2 : 4);
constexpr float KEY_MIDDLE = KEY_SYMMETRIC ? 1.5f : 0.f, VALUE_MIDDLE = VALUE_SYMMETRIC ? 1.5f : 0.f;

struct Cache {
    const u32 *codes;    // [B, H, C, W] int16
    const u8 *range;     // [B, H, C, KEY_RANGE or VALUE_RANGE] bytes, fp16: scales, then, but of symmetric ones, minima
    const u16 *ring;     // [B, H, window, D]
    const u16 *pivots;   // [B, H, pivots, D]
    const u16 *fresh;    // [B, H, fresh_count, D] or null
    const u16 *text;     // [B, H, text_capacity, W]: the lower bits of text tokens
};

struct Params {
    const u16 *q;              // [B, H * G * Q, D], rows of one KV head side by side
    u16 *out;                  // the same shape
    Cache key, value;
    const int *state;          // [3] of the key: end, first position of the ring, text slot offset
    const int *pivot_at;       // [B, pivots]
    const i64 *fresh_at;       // [fresh_count]
    const void *mask;
    const u16 *affine;         // [B, 2 or, of uneven keys, 3, H, D] of the key, or null
    const u8 *classes;         // [B, C]
    const int *text_at;        // [B, text_capacity]
    float *part_o;             // [B * H, rows, splits, D]
    float *part_ml;            // [B * H, rows, splits, 2]
    i64 mask_b, mask_h, mask_q, mask_t;  // strides in elements
    float scale;               // of the scores, times log2(e)
    int heads, capacity, window, pivots, fresh_count, text_capacity;
    int rows, queries;         // G * Q, Q
    int length;                // -1: read state
    int mask_kind;             // 1 bool, 2 fp16, 3 bf16, 4 fp32
    int splits;
    int rotate;                // queries are not rotated yet: the kernel attends with H(q * s)
    int restore;               // the kernel rotates the output back, by H
    const u16 *means;          // [B, H, blocks, D] of the key, where KEY_BLOCKS
    const int *block_of;       // [B, C] of the key, where KEY_MOVED
    int blocks;
};

// Numbers of the cache's dtype.
__device__ __forceinline__ float from_native(u16 h) { return BF16 ? from_bf16(h) : from_half(h); }
__device__ __forceinline__ u32 native_pair(float first, float second) {
    return BF16 ? bf16_pair(first, second) : half_pair(first, second);
}

// Query row in a column of query tile n; -1 for a column that stays empty.
__device__ __forceinline__ int row_of(int n, int column) {
    return CC == 2 ? 8 * n + column : column & 1 ? -1 : 4 * n + column / 2;
}
// Token of a 16-token tile that fragment row g stands for, chosen such that one load of values takes four tokens that
// lie side by side.
__device__ __forceinline__ int token_of_row(int g) { return (g >> 1) + 4 * (g & 1); }
// Its inverse: where a token of a 16-token tile stands among the rows of keys.
__device__ __forceinline__ int row_of_token(int token) { return (token & ~7) + 2 * (token & 3) + (token >> 2 & 1); }
// First of the 16-bit words that a lane takes of a key, register r, and of a value, load v.
__device__ __forceinline__ int key_word(int t, int r) { return CONTIGUOUS ? t * (W / 4) + 2 * r : 2 * (t + 4 * r); }
__device__ __forceinline__ int value_word(int g, int v) { return PAIRED ? 2 * (g + 8 * v) : g + 8 * v; }

// A thread's place: its lane holds row g and column t of fragments; its block works on the query rows from row0 on of
// one KV head of one batch row (bh: batch * heads + head), and on one of the splits of that head's cache.
struct Thread {
    int warp, lane, g, t, bh, split, batch, row0, rows;

    __device__ __forceinline__ explicit Thread(const Params &p)
        : warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4), bh(blockIdx.x), split(blockIdx.y),
          batch(bh / p.heads), row0(blockIdx.z * ROWS), rows(min(ROWS, p.rows - row0)) {}
};

// Which positions stand where.
struct Places {
    int end;                       // of the appended tokens, which may or may not include the fresh ones
    int fresh_start, seen_end;     // first position of the fresh tokens; end of the positions that queries see
    int stored;                    // end of the positions that are read from the cache
    int ring_start, ring_end, body_end;
    int pivot;                     // position of the pivot of this lane's number, or -1
    i64 mask_base;                 // of this KV head's first row in the mask

    __device__ __forceinline__ Places(const Params &p, const Thread &self) {
        end = p.state[0];
        fresh_start = p.fresh_count ? (int)p.fresh_at[0] : end;
        const int last = fresh_start + p.fresh_count;
        seen_end = p.length < 0 ? last : MASK || p.fresh_count ? min(p.length, last) : p.length;
        stored = p.fresh_count ? min(seen_end, fresh_start) : seen_end;
        ring_end = min(end, stored), ring_start = p.window ? min(ring_end, max(p.state[1], end - p.window)) : ring_end;
        body_end = ring_end == stored ? ring_start : stored;
        pivot = self.lane < p.pivots ? p.pivot_at[self.batch * p.pivots + self.lane] : -1;
        mask_base = self.batch * p.mask_b + (self.bh % p.heads) * (p.rows / p.queries) * p.mask_h;
    }
};

// The tiles that a warp (a worker) takes. Wide tiles (tokens at 16 bits: first the ring, then pivots, then fresh ones)
// are dealt out round-robin. The next worker is the first to take text tiles, which lie side by side, so that their
// tokens are of few blocks. Of the body, a worker takes tiles body_first, ..., last_tile - 1, but for those that are all
// text. Its text tiles come before these and are numbered first_tile, ..., body_first - 1.
struct Share {
    int worker, workers;
    int ring_tiles, pivot_tiles, wide_tiles;
    int last_start;                 // of a tile of the body: the last one ends with the body
    int text_slots, text_begin, text_count;  // slots in use; first text tile of this worker; how many it takes
    int body_first, first_tile, last_tile;
    u64 needed;                     // of the first 64 tiles of its body: a bit for each that has other tokens than text

    __device__ __forceinline__ Share(const Params &p, const Thread &self, const Places &places) {
        workers = p.splits * WARPS, worker = self.split * WARPS + self.warp;
        ring_tiles = (p.window + WIDE_TILE - 1) / WIDE_TILE, pivot_tiles = (p.pivots + WIDE_TILE - 1) / WIDE_TILE;
        const int fresh_tiles = (p.fresh_count + WIDE_TILE - 1) / WIDE_TILE;
        wide_tiles = ring_tiles + pivot_tiles + fresh_tiles;
        text_slots = TEXT_BITS ? min(max(places.end + p.state[2], 0), p.text_capacity) : 0;
        const int tiles = (places.body_end + TILE - 1) / TILE;
        last_start = max(places.body_end - TILE, 0);
        const int text_tiles = (text_slots + TILE - 1) / TILE;
        const int rank = (worker - wide_tiles % workers + workers) % workers, more_text = text_tiles % workers;
        text_count = text_tiles / workers + (rank < more_text);
        text_begin = rank * (text_tiles / workers) + min(rank, more_text);

        // The first `extra` workers have one wide or text tile more than the others. It costs about as much as
        // WIDE_COST tiles of the body. So each of the others takes WIDE_COST more of these, or, where the body is
        // small, fewer: `more`.
        constexpr int WIDE_COST = 2;
        const int extra = (wide_tiles + text_tiles) % workers;
        const float share = max((float)(tiles - WIDE_COST * (extra ? workers - extra : 0)), 0.f) / workers;
        const float more = extra ? fminf(WIDE_COST, (tiles - share * workers) / (workers - extra)) : 0.f;
        body_first = min((int)(share * worker + more * max(worker - extra, 0) + 0.5f), tiles);
        first_tile = body_first - text_count;
        last_tile = worker + 1 == workers
                        ? tiles
                        : min((int)(share * (worker + 1) + more * max(worker + 1 - extra, 0) + 0.5f), tiles);
        needed = TEXT_BITS ? tiles_needed(p, self, places) : 0;
    }

    __device__ __forceinline__ u64 tiles_needed(const Params &p, const Thread &self, const Places &places) const {
        constexpr int AT_A_TIME = 8;  // loads that do not wait for each other
        const int count = min(last_tile - body_first, 64);
        const u8 *classes = p.classes + (i64)self.batch * p.capacity;
        u64 found = 0;
        for (int begin = 0; begin < count; begin += AT_A_TIME) {
            bool other[AT_A_TIME];
#pragma unroll
            for (int i = 0; i < AT_A_TIME; i++) {
                const int position = (body_first + begin + i) * TILE + self.lane;
                other[i] = begin + i < count && position < places.body_end && classes[position] != TEXT;
            }
#pragma unroll
            for (int i = 0; i < AT_A_TIME; i++)
                if (__any_sync(ALL, other[i])) found |= 1ull << (begin + i);
        }
        return found;
    }

    // The tile that follows on one, last_tile or more for none.
    __device__ __forceinline__ int next(int tile) const {
        const int following = tile + 1, place = following - body_first;
        if (!TEXT_BITS || place < 0 || place >= 64) return following;
        const u64 left = needed >> place;
        return left ? following + __ffsll(left) - 1 : body_first + 64;
    }
};

// What the mask adds to the score of one of the block's query rows with a token, in units of log2.
__device__ __forceinline__ float mask_of(const Params &p, const Places &places, int row, int position) {
    const i64 at = places.mask_base + row / p.queries * p.mask_h + row % p.queries * p.mask_q + position * p.mask_t;
    if (p.mask_kind == 1) return ((const u8 *)p.mask)[at] ? 0.f : -INFINITY;
    float x = p.mask_kind == 2   ? from_half(((const u16 *)p.mask)[at])
              : p.mask_kind == 3 ? from_bf16(((const u16 *)p.mask)[at])
                                 : ((const float *)p.mask)[at];
    return x * 1.44269504f;
}
// Whether a mask that is the same for all rows (MASK 1) shows them a token.
__device__ __forceinline__ u8 shown(const Params &p, const Places &places, int position) {
    return ((const u8 *)p.mask)[places.mask_base + position * p.mask_t];
}
