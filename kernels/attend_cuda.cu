// akvq::attend for a decode step over a 2-bit cache on tensor cores (sm_80 and later); kernels/attend_cuda.py launches
// it.
//
// Every warp streams tiles of 16 * MT tokens through a ring of its own in shared memory (cp.async) into the fragments
// of mma.m16n8k16, with no shuffle on the way. Tokens are the M side of S^T = K Q^T and channels the M side of O^T =
// V^T P^T, query rows the N side (8). Any order of channels along k is right as long as K and Q have the same one, so a
// lane uses the words that it loads as they come.
//
// A code becomes a float by one LOP3: or-ing it, where it stands, into the mantissa of a power of two gives offset +
// code exactly (fp16: 64, 16 or 4; bf16: 128, 32 or 8). The offsets leave by linearity: the score accumulators start at
// -sum(offset * q), and offset * sum(p') is taken off the output once, at the end. Scales and minima multiply scores
// and probabilities, never elements. Symmetric levels are code - 1.5: the 1.5 leaves with the offset, and there is no
// minimum. Uneven keys are asked by slot, with four times the query where the slot has a code's upper bits.
//
// A text token's code has its upper two bits in the body and its lower two in the overlay: q.(4 upper + lower) is two
// products of the same kind. Tiles of text are gathered by position into the arrangement of a tile of the body.
//
// Where blocks of keys have means of their own, a warp asks the means of 16 blocks at a time as it asks tokens at 16
// bits, and adds their products to the scores of its tiles: to a whole tile of the body that of its block, to each token
// of a tile of text that of the token's.
//
// This file has the kernels and what they do with a tile of codes. Its headers:
//   attend_cuda.cuh           shapes, arguments, which positions stand where, a warp's share of the work, masks
//   attend_tiles_cuda.cuh     codes as numbers; tiles in shared memory and on their way there
//   attend_queries_cuda.cuh   queries: as they are stored keys' and as a lane holds them
//   attend_sums_cuda.cuh      softmax and output as they are summed up, and their merge
//   attend_products_cuda.cuh  products of queries and weights with codes
//   attend_wide_cuda.cuh      tokens at 16 bits: ring, pivots and this step's own
//   attend_means_cuda.cuh     means of blocks of keys
//
// Compile-time:
//   HEAD_DIM                    multiple of 16
//   BF16                        0: fp16
//   KEY_GROUPS, VALUE_GROUPS    1, 2 or 4 scales a head
//   KEY_SYMMETRIC, VALUE_SYMMETRIC, KEY_UNEVEN, KEY_BLOCKS, KEY_MOVED
//                               as in kernels/layout.py
//   BLOCK                       tokens that share a mean, where KEY_BLOCKS
//   FIRST_NORM, MIDDLE_NORM     of uneven keys: NORM of the transforms of their parts
//   STAGE_BYTES                 that a tile takes in shared memory
//   NT                          tiles of 8 query rows
//   CC                          1 where a block has up to 4 query rows, else 2
//   MT, STAGES                  16-token tiles that a warp takes at a time, and how many such tiles its ring has
//   WARPS, BLOCKS               warps of a block; at least so many blocks on a multiprocessor
//   SPLITS_MAX                  parts that a cache is divided into, at most
//   NORM                        factor that makes H orthonormal: order**-0.5
//   MASK                        0 none, 1 bool and the same for all rows of a block, 2 any
//   TEXT_BITS, VALUE_TEXT_BITS  4: keys, values have a text overlay; 0: there is none, text is read from the body

#include "attend_products_cuda.cuh"
#include "attend_means_cuda.cuh"

// Of token x + lane of a body tile: whether queries see it (with MASK 1), and whether it is read from the text overlay.
__device__ __forceinline__ u8 seen_by_all(const Params &p, const Thread &self, const Places &places, const Share &share,
                                          int tile, int x) {
    const int first = share.body_first, last = share.last_tile, end = places.body_end;
    const int position = min(tile * TILE, share.last_start) + x + self.lane;
    return tile >= first && tile < last && position < end ? shown(p, places, position) : 0;
}
__device__ __forceinline__ bool in_overlay(const Params &p, const Thread &self, const Places &places,
                                           const Share &share, int tile, int x) {
    const int first = share.body_first, last = share.last_tile, end = places.body_end;
    const int position = min(tile * TILE, share.last_start) + x + self.lane;
    return tile >= first && tile < last && position < end && p.classes[(i64)self.batch * p.capacity + position] == TEXT;
}

// Both flags of this lane's token in each 32 tokens of a tile. Loaded a tile ahead, as codes are.
struct Flags {
    u8 seen[TILE / 32];
    bool text[TILE / 32];

    __device__ __forceinline__ void read(const Params &p, const Thread &self, const Places &places, const Share &share,
                                         int tile) {
#pragma unroll
        for (int x = 0; x < TILE; x += 32) {
            if (MASK == 1) seen[x / 32] = seen_by_all(p, self, places, share, tile, x);
            if (TEXT_BITS) text[x / 32] = in_overlay(p, self, places, share, tile, x);
        }
    }
};

constexpr u64 FULL = ~0ull >> (64 - TILE);  // a bit for each token of a tile

// Bits of the positions from `from` on that lie in [begin, end).
__device__ __forceinline__ u64 bits_between(int from, int begin, int end) {
    const int low = min(max(begin - from, 0), TILE), high = min(max(end - from, 0), TILE);
    const u64 below_high = high == 64 ? ~0ull : (1ull << high) - 1, below_low = low == 64 ? ~0ull : (1ull << low) - 1;
    return below_high & ~below_low;
}

// Which tokens of a tile are read from it: a bit for each. first, plain_end: as in attend_body; stage: where the tile
// stands.
__device__ __forceinline__ u64 live_tokens(const Places &places, const Flags &flags, int number, int first,
                                           int plain_end, bool is_text, u32 stage, int lane) {
    u64 elsewhere = 0;
    if (TEXT_BITS) {
#pragma unroll
        for (int x = 0; x < TILE; x += 32) elsewhere |= (u64)__ballot_sync(ALL, flags.text[x / 32]) << x;
    }
    u32 pivots = __ballot_sync(ALL, places.pivot >= first && places.pivot < first + TILE);
    u64 live = FULL;
    if (is_text) {
        live = __ballot_sync(ALL, read_int(stage + POSITIONS + lane * 4) >= 0);
    } else if (MASK == 1 || pivots || elsewhere || first + TILE > plain_end || first < number * TILE) {
        live = bits_between(first, number * TILE, places.body_end) & ~elsewhere;
        if (places.body_end > places.ring_start) live &= ~bits_between(first, places.ring_start, places.ring_end);
        while (pivots) {
            live &= ~(1ull << (__shfl_sync(ALL, places.pivot, __ffs(pivots) - 1) - first));
            pivots &= pivots - 1;
        }
        if (MASK == 1) {
#pragma unroll
            for (int x = 0; x < TILE; x += 32)
                live &= (u64)__ballot_sync(ALL, flags.seen[x / 32]) << x | ~((u64)ALL << x);
        }
    }
    return live;
}

// A tile's scores and the ranges of its values: of tokens 16 m + token_of_row(g) + 8 half and this lane's columns.
struct Scores {
    float s[MT][NT][2][CC];
    float scales[MT][2][VG], lows[MT][2][VG];  // lows of symmetric values: 0
};

// Scores of 16 text tokens, from those of their upper bits, which weigh four times the lower ones.
__device__ __forceinline__ void add_lower_bits(float (&c)[NT][KG][4], const Query &q, u32 rows, int g, int t) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int a = 0; a < KG; a++)
#pragma unroll
            for (int x = 0; x < 4; x++)
                c[n][a][x] = 4.f * c[n][a][x] + ((x & 1) < CC ? q.start[n][a][(x & 1) % CC] : 0.f);
    add_products(c, q, rows, g, t);
}

__device__ __forceinline__ void read_keys(Scores &scores, const Query &q, bool is_text, u32 stage, u32 key_ranges,
                                          u32 value_ranges, int g, int t) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
        float c[NT][KG][4];
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int a = 0; a < KG; a++)
#pragma unroll
                for (int x = 0; x < 4; x++) c[n][a][x] = (x & 1) < CC ? q.start[n][a][(x & 1) % CC] : 0.f;
        add_products(c, q, stage + 16 * m * (W * 2), g, t);
        if (is_text) add_lower_bits(c, q, stage + KEY_LOWER + 16 * m * (W * 2), g, t);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = 16 * m + 8 * half + token_of_row(g);
            const Range<KEY_RANGE> of_key(key_ranges, token);
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int x = 0; x < CC; x++) {
                    float &s = scores.s[m][n][half][x] = 0.f;
#pragma unroll
                    for (int a = 0; a < KG; a++)
                        if (KEY_SYMMETRIC)
                            s += c[n][a][2 * half + x] * of_key[a];
                        else
                            s += c[n][a][2 * half + x] * of_key[a] * q.factor[n][x] + of_key[KG + a] * q.sum[n][a][x];
                    if (KEY_SYMMETRIC) s *= q.factor[n][x];
                }
            const Range<VALUE_RANGE> of_value(value_ranges, token);
#pragma unroll
            for (int a = 0; a < VG; a++)
                scores.scales[m][half][a] = of_value[a],
                scores.lows[m][half][a] = VALUE_SYMMETRIC ? 0.f : of_value[VG + a];
        }
    }
}

__device__ __forceinline__ void add_mask(Scores &scores, const Params &p, const Thread &self, const Places &places,
                                         int first, bool is_text, u32 stage) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int x = 0; x < CC; x++) {
                    const int token = 16 * m + token_of_row(self.g) + 8 * half;
                    const int row = self.row0 + row_of(n, 2 * self.t + x);
                    const int at = is_text ? read_int(stage + POSITIONS + token * 4) : first + token;
                    if ((is_text ? at >= 0 : at < places.body_end) && row < p.rows)
                        scores.s[m][n][half][x] += mask_of(p, places, row, at);
                }
}

// Tokens that are not live do not count, even where their range is NaN.
__device__ __forceinline__ void drop(Scores &scores, u64 live, int g) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (!(live >> (16 * m + token_of_row(g) + 8 * half) & 1)) {
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int x = 0; x < CC; x++) scores.s[m][n][half][x] = -INFINITY;
#pragma unroll
                for (int a = 0; a < VG; a++) scores.scales[m][half][a] = scores.lows[m][half][a] = 0.f;
            }
}

// Values times weights, which `scores` holds by now; of text their lower bits count too where they have an overlay.
__device__ __forceinline__ void read_values(Sums &sums, const Scores &scores, bool is_text, u32 stage, int g, int t) {
    const bool whole = VALUE_TEXT_BITS && is_text;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        u32 b[NT][VG][2];
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int a = 0; a < VG; a++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float weighted[2] = {0.f, 0.f};
#pragma unroll
                    for (int x = 0; x < CC; x++) {
                        weighted[x] = scores.s[m][n][half][x] * scores.scales[m][half][a];
                        if (!VALUE_SYMMETRIC) sums.low[n][a][x] += scores.s[m][n][half][x] * scores.lows[m][half][a];
                    }
                    b[n][a][half] = transpose(bf16_pair(weighted[0], weighted[1]));
                }
            }
        add_values(sums, b, stage + (whole ? VALUE_LOWER : CODE_BYTES) + 16 * m * (W * 2), g, t);
        if (whole) {
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int a = 0; a < VG; a++)
#pragma unroll
                    for (int half = 0; half < 2; half++) b[n][a][half] = four_times(b[n][a][half]);
            add_values(sums, b, stage + CODE_BYTES + 16 * m * (W * 2), g, t);
        }
    }
}

// Attend to a warp's tiles of text and of the body, of which `feed` has those before `coming` on their way.
__device__ __forceinline__ void attend_body(const Params &p, const Thread &self, const Places &places,
                                            const Share &share, Feed &feed, int coming, const Queries &queries,
                                            const Query &q, Means &means, Sums &sums) {
    const bool has_ring = places.ring_start < places.ring_end;
    // before plain_end there is nothing but body, pivots and text
    const int plain_end = has_ring ? min(places.body_end, places.ring_start) : places.body_end;
    int number = share.next(share.first_tile - 1);
    Flags ahead;
    ahead.read(p, self, places, share, number);
    for (int stage = 0; number < share.last_tile;
         number = share.next(number), stage = stage + 1 == STAGES ? 0 : stage + 1) {
        // the last tile ends with the body and may begin among tokens of the one before, which it does not count again
        const int first = min(number * TILE, share.last_start);
        const bool is_text = TEXT_BITS && number < share.body_first;
        Stream::wait<STAGES - 2>();
        __syncwarp();
        feed.fetch_if_any(stage == 0 ? STAGES - 1 : stage - 1, TEXT_BITS ? coming : number + STAGES - 1);
        coming = share.next(coming);
        const u32 codes = feed.stream.at(stage);
        const u32 key_ranges = feed.stream.key_ranges(stage, first);
        const u32 value_ranges = feed.stream.value_ranges(stage, first);
        const Flags flags = ahead;
        ahead.read(p, self, places, share, share.next(number));

        const u64 live = live_tokens(places, flags, number, first, plain_end, is_text, codes, self.lane);
        if (TEXT_BITS && !live) continue;
        Scores scores;
        read_keys(scores, q, is_text, codes, key_ranges, value_ranges, self.g, self.t);
        if (KEY_BLOCKS && (KEY_MOVED || is_text)) {
            const int position = is_text ? read_int(codes + POSITIONS + self.lane * 4) : first + self.lane;
            const int block = !(live >> self.lane & 1) ? -1 : KEY_MOVED ? means.block_of[position] : position / BLOCK;
            means.add_each(scores.s, block, queries, q, self);
        } else if (KEY_BLOCKS) {
            const int block = number * TILE / BLOCK;  // of the tokens that count, which lie from number * TILE on
            means.turn_to(block, queries, q, self.g, self.t);
            means.add_to(scores.s, block, self.t);
        }
        if (MASK == 2) add_mask(scores, p, self, places, first, is_text, codes);
        if (live != FULL) drop(scores, live, self.g);
        sums.to_weights(scores.s);
        read_values(sums, scores, is_text, codes, self.g, self.t);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attend(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) u8 shared[];  // the warps' rings of tiles; afterwards their outputs
    __shared__ __align__(16) u16 q_half[ROWS][PITCH], q_exact[EXACT ? ROWS : 1][PITCH];
    __shared__ float q_factor[ROWS], q_sum[KG][ROWS], q_start[KG][ROWS];
    const Queries queries{q_half, EXACT ? q_exact : q_half, q_factor, q_sum, q_start};

    const Thread self(p);
    Raw raw[ROWS / WARPS];
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; i++) raw[i].load(p, self, self.warp + WARPS * i);
    const Places places(p, self);
    const Share share(p, self, places);
    Feed feed(p, self, places, share, shared);
    int coming = share.next(share.first_tile - 1);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++, coming = share.next(coming)) feed.fetch_if_any(i, coming);
    Means means(p, self, places, share);
    // Which blocks a tile of text is of is known when it is read, as where tokens moved.
    const bool asks_means = KEY_BLOCKS && !KEY_MOVED && share.first_tile == share.body_first &&
                            share.first_tile < share.last_tile;
    if (asks_means) means.load(share.first_tile * TILE / BLOCK, self.g, self.t);

    queries.read(p, self, raw);
    __syncthreads();
    const Query q(queries, self.g, self.t);
    if (asks_means) means.ask(queries, q, self.g, self.t);
    Sums sums;
    sums.clear();

    for (int i = share.worker; i < share.wide_tiles; i += share.workers) {
        const int slot = self.lane & 15, pivots = share.ring_tiles, fresh = share.ring_tiles + share.pivot_tiles;
        const Wide wide = i < pivots  ? ring_tile(p, places, slot + WIDE_TILE * i)
                          : i < fresh ? pivot_tile(p, places, slot + WIDE_TILE * (i - pivots))
                                      : fresh_tile(p, places, slot + WIDE_TILE * (i - fresh));
        attend_wide(p, self, places, wide, queries, q, sums);
    }

    attend_body(p, self, places, share, feed, coming, queries, q, means, sums);

    Stream::wait<0>();
    __syncthreads();  // no ring is in use any more
    merge(p, self, sums, shared);
}

// Merges the splits of a row, one block each: the 8 warps divide the splits, and a lane takes four channels at a time.
extern "C" __global__ void __launch_bounds__(256) combine(const __grid_constant__ Params p) {
    constexpr int LANES = D / 4, PARTS = (LANES + 31) / 32, MOST = SPLITS_MAX / 32;
    __shared__ float4 all_o[8][LANES];
    const i64 row = blockIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float2 *ml = (const float2 *)p.part_ml + row * p.splits;
    const float4 *part = (const float4 *)(p.part_o + row * p.splits * D);
    float2 own[MOST];
    float top = -INFINITY, l = 0.f;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        own[i] = lane + 32 * i < p.splits ? ml[lane + 32 * i] : make_float2(-INFINITY, 0.f);
        top = fmaxf(top, own[i].x);
    }
    top = warp_max(top);
    const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int i = 0; i < MOST; i++) own[i].x = exp2_fast(own[i].x - shift), l += own[i].x * own[i].y;
    l = warp_sum(l);
    float4 o[PARTS] = {};
#pragma unroll
    for (int i = 0; i < MOST; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int s = 32 * i + 8 * j + warp;
            const float weight = __shfl_sync(ALL, own[i].x, 8 * j + warp);
            if (s < p.splits)
#pragma unroll
                for (int k = 0; k < PARTS; k++)
                    if (lane + 32 * k < LANES) {
                        const float4 x = part[s * LANES + lane + 32 * k];
                        o[k].x += weight * x.x, o[k].y += weight * x.y, o[k].z += weight * x.z, o[k].w += weight * x.w;
                    }
        }
#pragma unroll
    for (int k = 0; k < PARTS; k++)
        if (lane + 32 * k < LANES) all_o[warp][lane + 32 * k] = o[k];
    __syncthreads();
    if (threadIdx.x < D) {
        float out = 0.f;
#pragma unroll
        for (int w = 0; w < 8; w++) out += ((const float *)all_o[w])[threadIdx.x];
        out = l == 0.f ? 0.f : out / l;
        if (p.restore) ((float *)all_o[0])[threadIdx.x] = out;  // no other thread reads this element
        else p.out[row * D + threadIdx.x] = (u16)native_pair(out, 0.f);
    }
    if (p.restore) {
        __syncthreads();
        if (warp == 0) write_restored(p.out + row * D, (const float *)all_o[0], lane);
    }
}
