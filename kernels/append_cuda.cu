// akvq::append and akvq::pack for NVIDIA GPUs; kernels/append_cuda.py launches them. One kernel rotates, clips,
// quantizes, packs and writes the tokens. The order of the arithmetic is that of kernels/quantizer.py, so that results
// are equal to the bit; but for sums, which symmetric layouts take.
//
// append  One warp per token and head, for every layout. A lane holds channels lane, lane + 32, ...; of an uneven
//         layout those of the first part, then those of the middle, then those of the last part.
// pack    Four lanes per token and head, for prompts at 2 bits. A lane holds runs of 8 channels that begin at
//         8 * lane + 32 * run: only the butterflies of 8 and 16 are lane exchanges, and rows are read, and words
//         written, 16 bytes at a time. The numbers to quantize are 16-bit floats, so a code is how many of three
//         16-bit thresholds a number reaches; one instruction compares two numbers. Further warps rotate the pivots.
//         Symmetric layouts have their edges at -step, 0 and step.
//         With `fresh` the buffers are new memory, and the kernel writes every byte outside ring and pivots.
//         Where text has more bits than the body, `pack` leaves out the codes and ranges of text tokens, and `append`
//         with TEXT_ONLY runs after it: it writes these and the lower bits.
//
// Keys with means of blocks (kernels/blocks.py): `append` quantizes what is left of a token without the mean of its
// block. One token that begins a block makes that mean itself, of what the ring holds of its head; the means of more
// tokens stand there before the launch.
//
// Compile-time:
//   HEAD_DIM, GROUPS  channels of a head; channel groups with a range (scale and minimum) of their own
//   DTYPE             0 fp16, 1 bf16, 2 fp32
//   ROTATE            a token x is stored as 0: x, 1: H x, 2: H((x - c) / s)
//   NORM              factor that makes H orthonormal: order**-0.5
//   SYMMETRIC         1: levels around zero; a range is scales alone
//   UNEVEN            1: kernels/uneven.py's layout of keys. NORM is of the first part, MIDDLE_NORM of the middle
//   MEANS             1: codes are differences from the means of blocks
//   MOVED             1: of these, tokens have left the positions of their block
//   BLOCK, ENOUGH     tokens that share a mean; fewer known ones make none
//   BITS, TEXT_BITS   2, 4 or 8; BITS 16: a lossless body; TEXT_BITS 0: no text overlay
//   LOW_WIDTH         Layout.low_width
//   CLIP, TEXT_CLIP   factor by which a range is shrunk before quantizing
//   TEXT_ONLY         1: `append` writes text tokens only, and `pack` the others
//   PACKS             1: compile `pack` too
//   WARPS             warps of a block

#include "numbers_cuda.cuh"

constexpr int D = HEAD_DIM, FIRST = D / 4;  // FIRST: channels of an uneven layout's first part
constexpr int N_FIRST = (FIRST + 31) / 32, N_MIDDLE = (2 * FIRST + 31) / 32;
constexpr int N = UNEVEN ? 2 * N_FIRST + N_MIDDLE : (D + 31) / 32;  // channels that a lane holds
constexpr int RANGE = SYMMETRIC ? GROUPS : 2 * GROUPS;              // numbers of a token's range
constexpr float SCALE_FLOOR = 1e-5f, HALF_MAX = 65504.f;
constexpr float STEP_2 = .9957f, STEP_4 = .3352f;  // STEPS of kernels/quantizer.py

struct Params {
    const void *x;
    const i64 *at;
    const u8 *kinds;
    const u16 *affine;
    int *state;
    u8 *classes;  // null where the keys hold them
    void *codes;
    u16 *range;
    void *ring;
    int *pivot_at;
    u16 *text_codes;
    int *text_at;
    u16 *pivots;
    const int *chosen;
    i64 x_b, x_h, x_t, kinds_b, kinds_t;
    int batch, heads, tokens, share, capacity, text_capacity, window, pivot_count, chosen_count, fresh;
    void *means;
    const int *block_of;  // of MOVED ones
    int blocks;           // means of a head
};

__device__ __forceinline__ float read(const void *from, i64 i) {
    if (DTYPE == 2) return ((const float *)from)[i];
    const u16 h = ((const u16 *)from)[i];
    return DTYPE == 1 ? from_bf16(h) : from_half(h);
}
// 1 / x, for a normal 16-bit float: a division would also handle cases that cannot occur here.
__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return fmaf(r, fmaf(-x, r, 1.f), r);
}
__device__ __forceinline__ float rounded(float x) {  // to the tokens' dtype
    return DTYPE == 2 ? x : DTYPE == 1 ? from_bf16(to_bf16(x)) : from_half(to_half(x));
}
__device__ __forceinline__ void write(void *to, i64 i, float x) {
    if (DTYPE == 2)
        ((float *)to)[i] = x;
    else
        ((u16 *)to)[i] = DTYPE == 1 ? to_bf16(x) : to_half(x);
}
// To fp16. A finite number out of range becomes the largest finite one; inf and NaN stay.
__device__ __forceinline__ u16 saturated(float x) {
    return to_half(fabsf(x) < INFINITY ? fminf(fmaxf(x, -HALF_MAX), HALF_MAX) : x);
}

// The channel that a lane holds in register i, D or more for none.
__device__ __forceinline__ int channel_of(int i, int lane) {
    if (!UNEVEN) return lane + 32 * i;
    const bool first = i < N_FIRST, middle = !first && i < N_FIRST + N_MIDDLE;
    const int place = lane + 32 * (first ? i : middle ? i - N_FIRST : i - N_FIRST - N_MIDDLE);
    return place < (middle ? 2 * FIRST : FIRST) ? place + (first ? 0 : middle ? FIRST : 3 * FIRST) : D;
}

#include "append_codes_cuda.cuh"
#include "append_means_cuda.cuh"

// Rotate the channels that lanes hold, parts of an uneven layout on their own, and round them to the tokens' dtype.
__device__ __forceinline__ void rotate_lanes(float (&x)[N], int lane) {
#if UNEVEN
    float first[N_FIRST], middle[N_MIDDLE];
#pragma unroll
    for (int i = 0; i < N_FIRST; i++) first[i] = x[i];
#pragma unroll
    for (int i = 0; i < N_MIDDLE; i++) middle[i] = x[N_FIRST + i];
    hadamard<FIRST>(first, lane);
    hadamard<2 * FIRST>(middle, lane);
#pragma unroll
    for (int i = 0; i < N_FIRST; i++) x[i] = first[i] * NORM;
#pragma unroll
    for (int i = 0; i < N_MIDDLE; i++) x[N_FIRST + i] = middle[i] * MIDDLE_NORM;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = rounded(x[i]);
#else
    hadamard<D>(x, lane);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = rounded(x[i] * NORM);
#endif
}

// What a call changes beside its tokens: one worker of each batch row drops pivots, one of all updates the state: the
// first, but where all of them read the state, the last.
__device__ __forceinline__ void finish(const Params &p, int batch, int head, int first, i64 worker, int lane) {
    const int start = (int)p.at[0], end = (int)p.at[p.tokens - 1] + 1;
    // Tokens are written from `start` on. After a crop that is before the old end: pivots from there on are replaced.
    if (head == 0 && first == 0 && !(p.chosen && start == 0))
        for (int i = lane; i < p.pivot_count; i += 32)
            if (p.pivot_at[batch * p.pivot_count + i] >= start) p.pivot_at[batch * p.pivot_count + i] = -1;
    const bool updates = MEANS && begins_block(p, start) ? last_to_arrive(p, lane) : worker == 0;
    if (updates && lane == 0) {  // where `start` lies past the end, the ring holds nothing of what is skipped
        const int last = p.fresh ? 0 : p.state[0], ring = p.fresh ? 0 : p.state[1];
        const int held = start > last ? start : min(ring, start);
        p.state[1] = max(held, end - p.window), p.state[0] = end;
        if (p.fresh) p.state[2] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) append(const __grid_constant__ Params p) {
    __shared__ u8 scratches[WARPS][D];
    const int lane = threadIdx.x % 32;
    u8 *scratch = scratches[threadIdx.x / 32];
    const int parts = (p.tokens + p.share - 1) / p.share;
    const i64 worker = (i64)blockIdx.x * WARPS + threadIdx.x / 32, lead = worker / parts;  // lead: batch row and head
    if (lead >= (i64)p.batch * p.heads) return;
    const int batch = (int)(lead / p.heads), head = (int)(lead % p.heads);
    const int first = (int)(worker % parts) * p.share, last = min(first + p.share, p.tokens);

    float centre[N], gain[N];
    int source[N];  // the channel of x that a lane's register is made of, D or more for none
#pragma unroll
    for (int i = 0; i < N; i++) source[i] = channel_of(i, lane);
    if (ROTATE == 2) {
        const u16 *map = p.affine + ((i64)batch * (UNEVEN ? 3 : 2) * p.heads + head) * D;
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (UNEVEN && source[i] < D) source[i] = (int)from_half(map[(i64)2 * p.heads * D + source[i]]);
            const int channel = source[i];
            centre[i] = channel < D ? from_half(map[channel]) : 0.f;
            gain[i] = channel < D ? reciprocal(from_half(map[(i64)p.heads * D + channel])) : 0.f;
        }
    }
    for (int token = first; token < last; token++) {
        const i64 from = batch * p.x_b + head * p.x_h + token * p.x_t;
        const int slot = (int)p.at[token], overlay = TEXT_BITS ? slot + p.state[2] : -1;
        const bool overlaid = overlay >= 0 && overlay < p.text_capacity;
        const u8 kind = p.kinds ? p.kinds[batch * p.kinds_b + token * p.kinds_t] : TEXT;
        if (TEXT_BITS && overlaid && head == 0 && lane == 0)
            p.text_at[(i64)batch * p.text_capacity + overlay] = kind == TEXT ? slot : -1;
        if (TEXT_ONLY && kind != TEXT) continue;
        float x[N];
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = source[i] < D ? read(p.x, from + source[i]) : 0.f;
        if (ROTATE) {
            if (ROTATE == 2) {
#pragma unroll
                for (int i = 0; i < N; i++) x[i] = (x[i] - centre[i]) * gain[i];
            }
            rotate_lanes(x, lane);
        }
        const bool as_text = TEXT_BITS && overlaid && kind == TEXT;
        float mean[N];
        if (MEANS && slot >= 0 && slot < p.capacity) mean_of_block(p, lead, batch, slot, kind, x, mean, lane);
        if (!TEXT_ONLY && p.window && token >= p.tokens - p.window) {
            const i64 to = (lead * p.window + slot % p.window) * D;
#pragma unroll
            for (int i = 0; i < N; i++)
                if (channel_of(i, lane) < D) write(p.ring, to + channel_of(i, lane), x[i]);
        }
        const bool inside = slot >= 0 && slot < p.capacity;
        const i64 place = lead * p.capacity + slot;
        if (inside) {
            if (MEANS) {
#pragma unroll
                for (int i = 0; i < N; i++) x[i] -= mean[i];
            }
            if (BITS == 16) {
#pragma unroll
                for (int i = 0; i < N; i++)
                    if (lane + 32 * i < D) write(p.codes, place * D + lane + 32 * i, x[i]);
            } else {
                constexpr int BODY = BITS == 16 ? 2 : BITS;
                u16 *codes = (u16 *)p.codes + place * (D * BODY / 16), *range = p.range + place * RANGE;
                u16 *lower = p.text_codes + (lead * p.text_capacity + overlay) * (D * LOW_WIDTH / 16);
                if (UNEVEN)
                    quantize_uneven(x, scratch, codes, range, lane);
                else if (SYMMETRIC)
                    quantize_symmetric<BODY>(x, scratch, codes, range, lane);
                else if (as_text)
                    quantize<TEXT_BITS ? TEXT_BITS : BODY, BODY, LOW_WIDTH>(x, TEXT_CLIP, scratch, codes, range, lower,
                                                                            lane);
                else if (!TEXT_ONLY)
                    quantize<BODY, BODY, 0>(x, CLIP, scratch, codes, range, nullptr, lane);
                if (TEXT_BITS && !TEXT_ONLY && overlaid && !as_text)
                    for (int i = lane; i < D * LOW_WIDTH / 16; i += 32) lower[i] = 0;
            }
        }
        if (!TEXT_ONLY && p.classes && head == 0 && lane == 0 && inside)
            p.classes[(i64)batch * p.capacity + slot] = kind;
    }
    if (!TEXT_ONLY) finish(p, batch, head, first, worker, lane);
}

#if PACKS
#include "append_pairs_cuda.cuh"

// Fill slots [from, to) of new buffers, to which no token is written.
__device__ __forceinline__ void clear(const Params &p, i64 lead, int batch, int head, int from, int to, int lane) {
    uint4 *words = (uint4 *)((u16 *)p.codes + lead * p.capacity * WORDS);
    for (int i = from * (WORDS / 8) + lane; i < to * (WORDS / 8); i += 32) words[i] = make_uint4(0, 0, 0, 0);
    for (int slot = from + lane; slot < to; slot += 32) {
        if (SYMMETRIC)
            p.range[lead * p.capacity + slot] = 0;
        else
            ((u32 *)p.range)[lead * p.capacity + slot] = 0;
        if (p.classes && head == 0) p.classes[(i64)batch * p.capacity + slot] = PADDING;
    }
}

__device__ __forceinline__ u8 kind_of(const Params &p, int batch, int token) {
    return p.kinds ? p.kinds[batch * p.kinds_b + token * p.kinds_t] : TEXT;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 3) pack(const __grid_constant__ Params p) {
    const int lane = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
    const int span = 8 * p.share, token_parts = (p.tokens + span - 1) / span;
    const int start = (int)p.at[0];
    const int *chosen = start == 0 ? p.chosen : nullptr;  // only a prompt that starts the cache has pivots
    const int parts = token_parts + (p.chosen ? (p.pivot_count + 7) / 8 : 0);
    const i64 worker = (i64)blockIdx.x * WARPS + threadIdx.x / 32, lead = worker / parts;  // lead: batch row and head
    if (lead >= (i64)p.batch * p.heads) return;
    const int batch = (int)(lead / p.heads), head = (int)(lead % p.heads), part = (int)(worker % parts);

    float centre[OWN], gain[OWN];
    if (ROTATE == 2) {
        const u16 *map = p.affine + ((i64)batch * 2 * p.heads + head) * D + 8 * lane;
        u32 c[OWN / 2], s[OWN / 2];
        load(c, map), load(s, map + (i64)p.heads * D);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            centre[i] = from_half((u16)(c[i / 2] >> 16 * (i % 2)));
            gain[i] = reciprocal(from_half((u16)(s[i / 2] >> 16 * (i % 2))));
        }
    }
    const u16 *rows = (const u16 *)p.x + batch * p.x_b + head * p.x_h + 8 * lane;
    u32 pairs[OWN / 2];

    if (part >= token_parts) {  // 8 pivots; an unused slot holds the first token, as in the reference
        if (!chosen) return;
        const int slot = 8 * (part - token_parts) + row;
        const int pivot = slot < p.chosen_count ? chosen[batch * p.chosen_count + slot] : -1, token = max(pivot, 0);
        load(pairs, rows + token * p.x_t);
        if (ROTATE) rotate(pairs, centre, gain, lane);
        if (slot >= p.pivot_count) return;
        store(p.pivots + (lead * p.pivot_count + slot) * D + 8 * lane, pairs);
        if (head == 0 && lane == 0) {
            const bool kept = pivot >= 0 && kind_of(p, batch, token) != PADDING;
            p.pivot_at[batch * p.pivot_count + slot] = kept ? (int)p.at[token] : -1;
        }
        return;
    }

    const int first = part * span, last = min(first + span, p.tokens);
    u32 next[OWN / 2];
    load(next, rows + min(first + row, last - 1) * p.x_t);
    for (int begin = first; begin < last; begin += 8) {
        const int token = begin + row;
        const bool real = token < last;
        const int slot = (int)p.at[min(token, last - 1)];
#pragma unroll
        for (int i = 0; i < OWN / 2; i++) pairs[i] = next[i];
        if (begin + 8 < last) load(next, rows + min(token + 8, last - 1) * p.x_t);
        if (ROTATE) rotate(pairs, centre, gain, lane);
        if (real && p.window && token >= p.tokens - p.window)
            store((u16 *)p.ring + (lead * p.window + slot % p.window) * D + 8 * lane, pairs);

#if SYMMETRIC
        float length = 0.f, along = 0.f;
#pragma unroll
        for (int i = 0; i < OWN / 2; i++) {
            const float a = first_of(pairs[i]), b = second_of(pairs[i]);
            length += a * a + b * b;
        }
#pragma unroll
        for (int h = 1; h < 4; h *= 2) length += __shfl_xor_sync(ALL, length, h);
        float step = STEP_2 * sqrtf(length / D);
        step = step == 0.f ? 1.f : step;
        // half to even: -step is in code 0, zero in code 2 and step in code 2
        const u32 own = threshold(0.f, step, lane == 0 ? -step : step, true);
        const u32 one = __shfl_sync(ALL, own, 0, 4), two = step < INFINITY ? 0 : 0x7fff7fff;
        const u32 three = __shfl_sync(ALL, own, 2, 4);
#pragma unroll
        for (int i = 0; i < OWN / 2; i++) {  // levels are 1.5 beyond the outer edges, else 0.5
            const u32 size = pairs[i] & 0x7fff7fff, outer = size & (reaches(pairs[i], three) | ~reaches(pairs[i], one));
            along += .5f * (first_of(size) + second_of(size)) + (first_of(outer) + second_of(outer));
        }
#pragma unroll
        for (int h = 1; h < 4; h *= 2) along += __shfl_xor_sync(ALL, along, h);
        const u16 scale_half = saturated(length == 0.f ? 0.f : length / along);
#else
        u32 lowest = pairs[0], highest = pairs[0];
#pragma unroll
        for (int i = 1; i < OWN / 2; i++) lowest = smaller(lowest, pairs[i]), highest = larger(highest, pairs[i]);
#pragma unroll
        for (int h = 1; h < 4; h *= 2) {
            lowest = smaller(lowest, __shfl_xor_sync(ALL, lowest, h));
            highest = larger(highest, __shfl_xor_sync(ALL, highest, h));
        }
        float low = first_of(smaller(lowest, lowest >> 16)) * CLIP;  // NaN where one number is
        const float high = first_of(larger(highest, highest >> 16)) * CLIP;
        float scale = high / 3 - low / 3;
        scale = scale < SCALE_FLOOR ? SCALE_FLOOR : scale;
        const u16 scale_half = saturated(scale), low_half = saturated(low);
        scale = from_half(scale_half), low = from_half(low_half);
        const u32 own = threshold(low, scale, (lane == 0 ? .5f : lane == 1 ? 1.5f : 2.5f) * scale, lane != 1);
        const u32 one = __shfl_sync(ALL, own, 0, 4), two = __shfl_sync(ALL, own, 1, 4);
        const u32 three = __shfl_sync(ALL, own, 2, 4);
#endif

        u32 words[4] = {0, 0, 0, 0};  // two neighbouring 16-bit words in each; codes of a word are WORDS channels apart
#pragma unroll
        for (int i = 0; i < OWN / 2; i++) {
            const u32 a = reaches(pairs[i], one), b = reaches(pairs[i], two), c = reaches(pairs[i], three);
            const int shift = i / 4 * (32 / WORDS) * 2;
            words[i % 4] |= ((a ^ b ^ c) & 0x00010001u << shift) | (b & 0x00020002u << shift);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i] <<= 8 * lane / WORDS * 2;
            if (WORDS <= 8) words[i] |= __shfl_xor_sync(ALL, words[i], 1);
            if (WORDS <= 16) words[i] |= __shfl_xor_sync(ALL, words[i], 2);
        }
        if (!real || slot < 0 || slot >= p.capacity) continue;
        const i64 place = lead * p.capacity + slot;
        const int overlay = slot + (p.fresh ? 0 : p.state[2]);  // new buffers have no state yet
        const bool overlaid = TEXT_ONLY && overlay >= 0 && overlay < p.text_capacity;
        if (!overlaid || kind_of(p, batch, token) != TEXT) {
            if (8 * lane < WORDS)
                *(uint4 *)((u16 *)p.codes + place * WORDS + 8 * lane) =
                    make_uint4(words[0], words[1], words[2], words[3]);
#if SYMMETRIC
            if (lane == 0) p.range[place] = scale_half;
#else
            if (lane == 0) ((u32 *)p.range)[place] = scale_half | (u32)low_half << 16;
#endif
        }
        if (p.classes && head == 0 && lane == 0) {
            u8 kind = kind_of(p, batch, token);
            if (chosen && kind != PADDING)
#pragma unroll 1
                for (int i = 0; i < min(p.chosen_count, p.pivot_count); i++)
                    if (chosen[batch * p.chosen_count + i] == token) kind = max(kind, PIVOT);
            p.classes[(i64)batch * p.capacity + slot] = kind;
        }
    }
    if (p.fresh && first == 0) clear(p, lead, batch, head, 0, min(start, p.capacity), threadIdx.x % 32);
    if (p.fresh && last == p.tokens)
        clear(p, lead, batch, head, max((int)p.at[p.tokens - 1] + 1, 0), p.capacity, threadIdx.x % 32);
    finish(p, batch, head, first, worker, threadIdx.x % 32);
}
#endif
