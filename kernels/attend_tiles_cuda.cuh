// Tiles of 2-bit tokens: how codes become numbers, how they stand in shared memory, and how they get there.

#pragma once

#include "attend_cuda.cuh"

// (x & mask) | bits in one instruction; left to itself the compiler makes two of it, since both are constants.
__device__ __forceinline__ u32 mask_or(u32 x, u32 mask, u32 bits) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

// Code j of two words at once: offset + code, as two fp16 or two bf16.
struct HalfCodes {
    u32 x, low, high;
    __device__ __forceinline__ explicit HalfCodes(u32 word) : x(word), low(word << 6), high(word >> 6) {}
    __device__ __forceinline__ u32 operator[](int j) const {
        u32 from = j < 2 ? low : j < 5 ? x : high;
        int at = (j + 1) % 3;  // bits 4-5, 6-7 or 8-9 of the mantissa
        return at == 0 ? mask_or(from, 0x00300030u, 0x54005400u)
             : at == 1 ? mask_or(from, 0x00C000C0u, 0x4C004C00u)
                       : mask_or(from, 0x03000300u, 0x44004400u);
    }
    static __device__ __forceinline__ float offset(int j) {
        return (j + 1) % 3 == 0 ? 64.f : (j + 1) % 3 == 1 ? 16.f : 4.f;
    }
};
struct Bf16Codes {
    u32 x, high, top;
    __device__ __forceinline__ explicit Bf16Codes(u32 word) : x(word), high(word >> 6), top(word >> 12) {}
    __device__ __forceinline__ u32 operator[](int j) const {
        u32 from = j < 3 ? x : j < 6 ? high : top;
        return j % 3 == 0 ? mask_or(from, 0x00030003u, 0x43004300u)
             : j % 3 == 1 ? mask_or(from, 0x000C000Cu, 0x42004200u)
                          : mask_or(from, 0x00300030u, 0x41004100u);
    }
    static __device__ __forceinline__ float offset(int j) { return j % 3 == 0 ? 128.f : j % 3 == 1 ? 32.f : 8.f; }
};

// One tile in shared memory: codes of keys (rows in the order of the fragments) and of values, then their ranges. A
// tile of text tokens also has the lower bits of keys and values, and positions.
//
// Ranges are copied in words of 4 bytes. Where a token's range has 2, a tile may begin in the middle of a word: it is
// copied from the word's start on, and takes a word more.
__device__ constexpr int padded(int bytes) { return (bytes + 15) / 16 * 16; }
__device__ constexpr int range_bytes(int range) { return padded(TILE * range + range % 4); }
constexpr int CODE_BYTES = TILE * W * 2, KEY_RANGES = 2 * CODE_BYTES;
constexpr int VALUE_RANGES = KEY_RANGES + range_bytes(KEY_RANGE);
constexpr int KEY_LOWER = VALUE_RANGES + range_bytes(VALUE_RANGE);
constexpr int VALUE_LOWER = KEY_LOWER + (TEXT_BITS ? CODE_BYTES : 0);
constexpr int POSITIONS = VALUE_LOWER + (VALUE_TEXT_BITS ? CODE_BYTES : 0);
static_assert(STAGE_BYTES == padded(POSITIONS + (TEXT_BITS ? TILE * 4 : 0)), "attend_cuda.py reserves as much");
constexpr int CHUNK = W % 8 == 0 ? 16 : 4;                // bytes of one cp.async
constexpr int ROW_CHUNKS = W * 2 / CHUNK;

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void *from) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

// Copies a word, of which bytes from `bytes` on become 0 and are not read: they may lie behind the buffer.
__device__ __forceinline__ void copy_word(u32 to, const void *from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

// Copies tiles of one head into a warp's ring of STAGES tiles in shared memory.
struct Stream {
    const u8 *k, *v, *kr, *vr;  // of token 0 of the head, this lane's first chunk
    u32 base;                   // of this warp's ring in shared memory
    int lane;

    __device__ __forceinline__ Stream(const Params &p, i64 head, u32 base_, int lane_) : base(base_), lane(lane_) {
        k = (const u8 *)p.key.codes + head * (W * 2) + lane * CHUNK;
        v = (const u8 *)p.value.codes + head * (W * 2) + lane * CHUNK;
        kr = p.key.range + head * KEY_RANGE + lane * 4;
        vr = p.value.range + head * VALUE_RANGE + lane * 4;
    }
    __device__ __forceinline__ u32 at(int stage) const { return base + stage * STAGE_BYTES; }

    // Bytes between the start of a word and the range of the tile's first token, which stands in it.
    template <int RANGE>
    static __device__ __forceinline__ u32 skew(const u8 *range) {
        return RANGE % 4 ? (u32)(u64)range & 3 : 0;
    }
    __device__ __forceinline__ u32 key_ranges(int stage, int first) const {
        return at(stage) + KEY_RANGES + skew<KEY_RANGE>(kr + (i64)first * KEY_RANGE);
    }
    __device__ __forceinline__ u32 value_ranges(int stage, int first) const {
        return at(stage) + VALUE_RANGES + skew<VALUE_RANGE>(vr + (i64)first * VALUE_RANGE);
    }

    // Words 32 i to 32 i + 31 of a tile's ranges, where it has so many; from: its first one, this lane's word.
    template <int RANGE>
    __device__ __forceinline__ void copy_ranges(u32 to, const u8 *from, int i) const {
        const int before = skew<RANGE>(from), left = TILE * RANGE + before - lane * 4;
        if (RANGE % 4 == 0 && i < TILE * RANGE / 128) copy_async<4>(to + (lane + 32 * i) * 4, from + 128 * i);
        if (RANGE % 4 && i == 0 && left > 0) copy_word(to + lane * 4, from - before, min(left, 4));
    }

    __device__ __forceinline__ void fetch(int stage, int first) const {
        const u32 to = at(stage);
        const i64 codes = (i64)first * (W * 2), key_range = (i64)first * KEY_RANGE;
        const i64 value_range = (i64)first * VALUE_RANGE;
#pragma unroll
        for (int i = 0; i < CODE_BYTES / CHUNK / 32; i++) {
            const int chunk = lane + 32 * i, row = row_of_token(chunk / ROW_CHUNKS);
            copy_async<CHUNK>(to + (row * ROW_CHUNKS + chunk % ROW_CHUNKS) * CHUNK, k + codes + 32 * CHUNK * i);
            copy_async<CHUNK>(to + CODE_BYTES + chunk * CHUNK, v + codes + 32 * CHUNK * i);
        }
#pragma unroll
        for (int i = 0; i < (TILE * max(KEY_RANGE, VALUE_RANGE) + 127) / 128; i++) {
            copy_ranges<KEY_RANGE>(to + KEY_RANGES, kr + key_range, i);
            copy_ranges<VALUE_RANGE>(to + VALUE_RANGES, vr + value_range, i);
        }
    }
    // A tile of text tokens. Lane i has the position of token i, -1 for none; codes and range are read from there, the
    // lower bits from slot first + i of the overlay.
    __device__ __forceinline__ void gather(int stage, const Params &p, i64 bh, int first, int position) const {
        const u32 to = at(stage);
        const i64 slots = bh * p.text_capacity;
#pragma unroll
        for (int i = 0; i < CODE_BYTES / CHUNK / 32; i++) {
            const int chunk = lane + 32 * i, token = chunk / ROW_CHUNKS, part = chunk % ROW_CHUNKS;
            const i64 from = (i64)max(__shfl_sync(ALL, position, token), 0) * (W * 2) + (part - lane) * CHUNK;
            const i64 lower = (slots + min(first + token, p.text_capacity - 1)) * (W * 2) + part * CHUNK;
            const u32 key_row = to + (row_of_token(token) * ROW_CHUNKS + part) * CHUNK;
            const u32 value_row = to + CODE_BYTES + chunk * CHUNK;
            copy_async<CHUNK>(key_row, k + from);
            copy_async<CHUNK>(value_row, v + from);
            copy_async<CHUNK>(key_row + KEY_LOWER, (const u8 *)p.key.text + lower);
            if (VALUE_TEXT_BITS)
                copy_async<CHUNK>(value_row - CODE_BYTES + VALUE_LOWER, (const u8 *)p.value.text + lower);
        }
#pragma unroll
        for (int i = 0; i < TILE * KG / 32; i++) {
            const int word = lane + 32 * i;
            const i64 from = (i64)max(__shfl_sync(ALL, position, word / KG), 0) * (KG * 4) + (word % KG - lane) * 4;
            copy_async<4>(to + KEY_RANGES + word * 4, kr + from);
            copy_async<4>(to + VALUE_RANGES + word * 4, vr + from);
        }
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + POSITIONS + lane * 4), "r"(position) : "memory");
    }
    static __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    template <int PENDING>
    static __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
};

// Fetches the tiles of a warp's share, in their order.
struct Feed {
    const Params &p;
    const Thread &self;
    const Places &places;
    const Share &share;
    const Stream stream;
    int position_ahead;  // of the text tile to be fetched next, loaded early so that loading its codes need not wait

    __device__ __forceinline__ Feed(const Params &p_, const Thread &self_, const Places &places_, const Share &share_,
                                    u8 *rings)
        : p(p_), self(self_), places(places_), share(share_),
          stream(p, (i64)self.bh * p.capacity,
                 (u32)__cvta_generic_to_shared(rings) + self.warp * STAGES * STAGE_BYTES, self.lane) {
        position_ahead = TEXT_BITS ? text_position(share.first_tile) : -1;
    }

    // Of a text tile: this lane's slot in the overlay, and the position that stands there, -1 for none.
    __device__ __forceinline__ int text_slot(int tile) const {
        return (share.text_begin + tile - share.first_tile) * TILE + self.lane;
    }
    __device__ __forceinline__ int text_position(int tile) const {
        const int slot = tile < share.body_first ? text_slot(tile) : share.text_slots;
        return slot < share.text_slots ? p.text_at[(i64)self.batch * p.text_capacity + slot] : -1;
    }
    __device__ __forceinline__ void fetch_text(int stage, int tile) {
        int position = position_ahead;
        position_ahead = text_position(tile + 1);
        if (position >= places.stored || (position >= places.ring_start && position < places.ring_end)) position = -1;
        for (int i = 0; i < p.pivots; i++)
            if (position == __shfl_sync(ALL, places.pivot, i)) position = -1;  // a pivot is read from its overlay
        if (MASK == 1 && position >= 0 && !shown(p, places, position)) position = -1;
        stream.gather(stage, p, self.bh, text_slot(tile) - self.lane, position);
    }
    __device__ __forceinline__ void fetch(int stage, int tile) {
        if (!TEXT_BITS || tile >= share.body_first)
            stream.fetch(stage, min(tile * TILE, share.last_start));
        else
            fetch_text(stage, tile);
    }
    // Called even where no tile is left, since `wait` counts commits.
    __device__ __forceinline__ void fetch_if_any(int stage, int tile) {
        if (tile < share.last_tile) fetch(stage, tile);
        Stream::commit();
    }
};

template <int N>
__device__ __forceinline__ void read_shared(u32 (&to)[N], u32 from) {
    if (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(to[i]), "=r"(to[i + 1]), "=r"(to[i + 2]), "=r"(to[i + 3])
                         : "r"(from + 4 * i));
    } else if (N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2)
            asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(to[i]), "=r"(to[i + 1]) : "r"(from + 4 * i));
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) asm volatile("ld.shared.b32 %0, [%1];" : "=r"(to[i]) : "r"(from + 4 * i));
    }
}
__device__ __forceinline__ int read_int(u32 from) {
    int x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from));
    return x;
}
__device__ __forceinline__ u32 read_word(u32 from) {
    u16 x;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(from));
    return x;
}

// A token's range, as it stands there: its words, and its numbers.
template <int RANGE>
struct Range {
    u32 words[(RANGE + 3) / 4];

    __device__ __forceinline__ Range(u32 ranges, int token) {
        const u32 from = ranges + token * RANGE;
        if (RANGE % 4)
            words[0] = read_word(from);
        else
            read_shared(words, from);
    }
    __device__ __forceinline__ float operator[](int i) const {
        return from_half((u16)(words[i / 2] >> 16 * (i & 1)));
    }
};
