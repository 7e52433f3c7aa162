// akvq::attend for a decode step over a 2-bit cache on tensor cores (sm_80 and later); kernels/attend_cuda.py launches it.
//
// Every warp streams tiles of 16 * MT tokens through a ring of its own in shared memory (cp.async) into the fragments of mma.m16n8k16,
// with no shuffle on the way. Tokens are the M side of S^T = K Q^T and channels the M side of O^T = V^T P^T, query rows the N side (8).
// Which channel a fragment's k index means is free as long as Q agrees, so a lane simply takes the words it reads.
//
// A code becomes a float by one LOP3: or-ing it, where it stands, into the mantissa of a power of two gives offset + code exactly
// (fp16: 64, 16 or 4; bf16: 128, 32 or 8). The offsets leave by linearity: the score accumulators start at -sum(offset * q), and
// offset * sum(p') is taken off the output once, at the end. Scales and minima multiply scores and probabilities, never elements.
//
// A text token's code has its upper bits in the body and its lower ones in the overlay, two each: q.(4 upper + lower) is two products of the
// same kind. Its tiles are gathered by position; a lane's part of one arrives as the body's does.
//
// Compile-time: HEAD_DIM (multiple of 16), BF16 (0: fp16), GROUPS (1, 2 or 4 scales a head), NT (tiles of 8 query rows), CC (1 where a
// block has up to 4 query rows, else 2), MT, STAGES, WARPS, BLOCKS (at least so many on a multiprocessor), SPLITS_MAX, NORM (the transform's, order**-0.5),
// MASK (0 none, 1 bool and the same for all rows of a block, 2 any), TEXT_BITS (4: keys have a text overlay; 0: there is none),
// VALUE_TEXT_BITS (the same of values; 0: text is read from their body).

#undef INFINITY
#define INFINITY __int_as_float(0x7f800000)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int D = HEAD_DIM, W = D / 8, NG = GROUPS;  // W: int16 words of a token
constexpr int ROWS = 4 * CC * NT;                       // query rows of a block; with CC 1 they take every other column
constexpr int R = (W + 7) / 8;                       // 32-bit registers a lane holds of a key
constexpr int PIECES = 8 * R;                        // channel pairs a lane holds of a key
constexpr bool CONTIGUOUS = W % 8 == 0;              // a lane's words of a key lie side by side
constexpr bool PAIRED = W % 16 == 0;                 // a lane takes two words of a value, else one
constexpr int VR = PAIRED ? W / 16 : (W + 7) / 8;    // loads a lane makes of a value
constexpr int OT = PAIRED ? 8 * VR : 4 * VR;         // output tiles of 16 channels
constexpr int TILE = 16 * MT;
constexpr int OWN = (D + 31) / 32;                   // channels lane, lane + 32, ... of a row that a lane holds where a warp takes one
#if TEXT_BITS
constexpr u8 TEXT = 1;  // the class of tokens that the text overlay is read for; a pivot is none of them
#endif
static_assert(!TEXT_BITS || (TEXT_BITS == 4 && TILE == 32), "two bits above and two below; a lane has one token's position");
constexpr u32 ALL = 0xffffffffu;

struct Cache {
    const u32 *codes;    // [B, H, C, W] int16
    const u32 *range;    // [B, H, C, 2 * NG] fp16: scales, then minima
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
    const long long *fresh_at; // [fresh_count]
    const void *mask;
    const u16 *affine;         // [B, 2, H, D] of the key, or null
    const u8 *classes;         // [B, C]
    const int *text_at;        // [B, text_capacity]
    float *part_o;             // [B * H, rows, splits, D]
    float *part_ml;            // [B * H, rows, splits, 2]
    long long mask_b, mask_h, mask_q, mask_t;  // strides in elements
    float scale;               // of the scores, times log2(e)
    int heads, capacity, window, pivots, fresh_count, text_capacity;
    int rows, queries;         // G * Q, Q
    int length;                // -1: read state
    int mask_kind;             // 1 bool, 2 fp16, 3 bf16, 4 fp32
    int splits;
    int turn;                  // queries come as the model made them: H(q * s) is asked
    int restore;               // the output leaves as the model made it: H is applied to it
};

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ float bf16_to_float(u16 h) { return __uint_as_float((u32)h << 16); }
__device__ __forceinline__ float to_float(u16 h) { return BF16 ? bf16_to_float(h) : half_to_float(h); }
__device__ __forceinline__ u32 pack_half(float lo, float hi) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
__device__ __forceinline__ u32 pack_native(float lo, float hi) { return BF16 ? pack_bf16(lo, hi) : pack_half(lo, hi); }
__device__ __forceinline__ u32 four_times(u32 pair) {  // of bf16
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(pair), "r"(0x40804080u), "r"(0x80008000u));
    return d;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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
    static __device__ __forceinline__ float offset(int j) { return (j + 1) % 3 == 0 ? 64.f : (j + 1) % 3 == 1 ? 16.f : 4.f; }
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

__device__ __forceinline__ int key_word(int t, int r) { return CONTIGUOUS ? t * (W / 4) + 2 * r : 2 * (t + 4 * r); }
// Query row in a column of query tile n; -1 for a column that stays empty.
__device__ __forceinline__ int row_of(int n, int column) { return CC == 2 ? 8 * n + column : column & 1 ? -1 : 4 * n + column / 2; }
__device__ __forceinline__ int value_word(int g, int v) { return PAIRED ? 2 * (g + 8 * v) : g + 8 * v; }
// Token of a 16-token tile that fragment row g means: such that one load of values takes four tokens side by side.
__device__ __forceinline__ int token_of_row(int g) { return (g >> 1) + 4 * (g & 1); }

// One tile in shared memory: codes of keys (rows in the order in which fragments take them) and values, then their ranges; of text
// tokens also the lower bits of keys and values, and positions.
constexpr int CODE_BYTES = TILE * W * 2, RANGE_BYTES = TILE * NG * 4;
constexpr int KEY_LOWER = 2 * (CODE_BYTES + RANGE_BYTES), VALUE_LOWER = KEY_LOWER + (TEXT_BITS ? CODE_BYTES : 0);
constexpr int POSITIONS = VALUE_LOWER + (VALUE_TEXT_BITS ? CODE_BYTES : 0);
constexpr int STAGE_BYTES = (POSITIONS + (TEXT_BITS ? TILE * 4 : 0) + 15) / 16 * 16;
constexpr int CHUNK = W % 8 == 0 ? 16 : 4;                // bytes of one cp.async
constexpr int ROW_CHUNKS = W * 2 / CHUNK;

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void *from) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

// Where a token of a 16-token tile stands among the rows of keys, the inverse of token_of_row.
__device__ __forceinline__ int row_of_token(int token) { return (token & ~7) + 2 * (token & 3) + (token >> 2 & 1); }

struct Stream {
    const u8 *k, *v, *kr, *vr;  // of token 0 of the head, this lane's first chunk
    u32 base;                   // of this warp's ring in shared memory
    int lane;

    __device__ __forceinline__ Stream(const Params &p, long long head, u32 base_, int lane_) : base(base_), lane(lane_) {
        k = (const u8 *)p.key.codes + head * (W * 2) + lane * CHUNK;
        v = (const u8 *)p.value.codes + head * (W * 2) + lane * CHUNK;
        kr = (const u8 *)p.key.range + head * (NG * 4) + lane * 4, vr = (const u8 *)p.value.range + head * (NG * 4) + lane * 4;
    }
    __device__ __forceinline__ u32 at(int stage) const { return base + stage * STAGE_BYTES; }

    __device__ __forceinline__ void fetch(int stage, int first) const {
        const u32 to = at(stage);
        const long long codes = (long long)first * (W * 2), ranges = (long long)first * (NG * 4);
#pragma unroll
        for (int i = 0; i < CODE_BYTES / CHUNK / 32; i++) {
            const int chunk = lane + 32 * i, row = row_of_token(chunk / ROW_CHUNKS);
            copy_async<CHUNK>(to + (row * ROW_CHUNKS + chunk % ROW_CHUNKS) * CHUNK, k + codes + 32 * CHUNK * i);
            copy_async<CHUNK>(to + CODE_BYTES + chunk * CHUNK, v + codes + 32 * CHUNK * i);
        }
#pragma unroll
        for (int i = 0; i < TILE * NG / 32; i++) {
            copy_async<4>(to + 2 * CODE_BYTES + (lane + 32 * i) * 4, kr + ranges + 128 * i);
            copy_async<4>(to + 2 * CODE_BYTES + RANGE_BYTES + (lane + 32 * i) * 4, vr + ranges + 128 * i);
        }
    }
    // The same of text tokens: this lane's stands at `position` of the body, or has none (-1), and those of the tile in slots `first`, ...
    __device__ __forceinline__ void gather(int stage, const Params &p, long long bh, int first, int position) const {
        const u32 to = at(stage);
        const long long slots = bh * p.text_capacity;
#pragma unroll
        for (int i = 0; i < CODE_BYTES / CHUNK / 32; i++) {
            const int chunk = lane + 32 * i, token = chunk / ROW_CHUNKS, part = chunk % ROW_CHUNKS;
            const long long from = (long long)max(__shfl_sync(ALL, position, token), 0) * (W * 2) + (part - lane) * CHUNK;
            const long long lower = (slots + min(first + token, p.text_capacity - 1)) * (W * 2) + part * CHUNK;
            const u32 key_row = to + (row_of_token(token) * ROW_CHUNKS + part) * CHUNK, value_row = to + CODE_BYTES + chunk * CHUNK;
            copy_async<CHUNK>(key_row, k + from);
            copy_async<CHUNK>(value_row, v + from);
            copy_async<CHUNK>(key_row + KEY_LOWER, (const u8 *)p.key.text + lower);
            if (VALUE_TEXT_BITS) copy_async<CHUNK>(value_row - CODE_BYTES + VALUE_LOWER, (const u8 *)p.value.text + lower);
        }
#pragma unroll
        for (int i = 0; i < TILE * NG / 32; i++) {
            const int word = lane + 32 * i;
            const long long from = (long long)max(__shfl_sync(ALL, position, word / NG), 0) * (NG * 4) + (word % NG - lane) * 4;
            copy_async<4>(to + 2 * CODE_BYTES + word * 4, kr + from);
            copy_async<4>(to + 2 * CODE_BYTES + RANGE_BYTES + word * 4, vr + from);
        }
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + POSITIONS + lane * 4), "r"(position) : "memory");
    }
    static __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    template <int PENDING>
    static __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
};

template <int N>
__device__ __forceinline__ void read_shared(u32 (&to)[N], u32 from) {
    if (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(to[i]), "=r"(to[i + 1]), "=r"(to[i + 2]), "=r"(to[i + 3]) : "r"(from + 4 * i));
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

// Bits first..last - 1 of the positions from `from` on that lie in [begin, end).
__device__ __forceinline__ u64 bits_between(int from, int begin, int end) {
    const int low = min(max(begin - from, 0), TILE), high = min(max(end - from, 0), TILE);
    const u64 below_high = high == 64 ? ~0ull : (1ull << high) - 1, below_low = low == 64 ? ~0ull : (1ull << low) - 1;
    return below_high & ~below_low;
}

__device__ __forceinline__ float scale_of(const u32 (&range)[NG], int group) {
    return half_to_float((u16)(range[group / 2] >> 16 * (group & 1)));
}
__device__ __forceinline__ float minimum_of(const u32 (&range)[NG], int group) {
    return half_to_float((u16)(range[(NG + group) / 2] >> 16 * ((NG + group) & 1)));
}

__device__ __forceinline__ float load_mask(const Params &p, long long at) {
    if (p.mask_kind == 1) return ((const u8 *)p.mask)[at] ? 0.f : -INFINITY;
    float x = p.mask_kind == 2   ? half_to_float(((const u16 *)p.mask)[at])
              : p.mask_kind == 3 ? bf16_to_float(((const u16 *)p.mask)[at])
                                 : ((const float *)p.mask)[at];
    return x * 1.44269504f;
}

// What a warp has accumulated: for its columns 2t, 2t + 1 of every query tile.
struct Sums {
    float o[NT][OT][4];         // channels of rows g and g + 8, columns 2t and 2t + 1
    float m[NT][CC], l[NT][CC]; // running maximum; sum of p over this lane's tokens
    float low[NT][NG][CC];      // sum of p * minimum, over this lane's tokens
    float p[NT][NG][4];         // sum of p' = p * scale as rounded (rows are equal)

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int o_ = 0; o_ < OT; o_++) o[n][o_][0] = o[n][o_][1] = o[n][o_][2] = o[n][o_][3] = 0.f;
#pragma unroll
            for (int c = 0; c < CC; c++) m[n][c] = -INFINITY, l[n][c] = 0.f;
#pragma unroll
            for (int a = 0; a < NG; a++) {
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
                        for (int a = 0; a < NG; a++) p[n][a][2 * half + c] *= alpha[c];
                    }
#pragma unroll
                    for (int a = 0; a < NG; a++) low[n][a][c] *= alpha[c];
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

// H x of a row that a warp holds.
__device__ __forceinline__ void hadamard(float (&x)[OWN], int lane) {
    constexpr int ORDER = D & -D;
#pragma unroll
    for (int h = 1; h < ORDER; h *= 2)
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (h < 32) {
                const float other = __shfl_xor_sync(ALL, x[i], h);
                x[i] = lane & h ? other - x[i] : x[i] + other;
            } else if (!(i & h / 32)) {
                const float a = x[i], b = x[(i | h / 32) % OWN];
                x[i] = a + b, x[(i | h / 32) % OWN] = a - b;
            }
        }
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] *= NORM;
}

// H(x * gain) of such a row, rounded to the queries' dtype.
__device__ __forceinline__ void turn_query(float (&x)[OWN], const u16 *gain, int lane) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (gain && lane + 32 * i < D) x[i] *= half_to_float(gain[lane + 32 * i]);
    hadamard(x, lane);
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = to_float((u16)pack_native(x[i], 0.f));
}

// A finished row in shared memory, as the model made it: one warp's work.
__device__ __forceinline__ void write_restored(u16 *out, const float *row, int lane) {
    float x[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = lane + 32 * i < D ? row[lane + 32 * i] : 0.f;
    hadamard(x, lane);
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (lane + 32 * i < D) out[lane + 32 * i] = (u16)pack_native(x[i], 0.f);
}

struct Query {
    u32 f[NT][PIECES];            // fp16 fragments
    float sum[NT][NG][CC];        // of this lane's columns: sum q, times factor
    float start[NT][NG][CC];      // -sum(offset * q)
    float factor[NT][CC];         // q as stored * factor = q * scale * log2(e)
};

// c += q (offset + code) for the 16 keys whose rows of words stand in shared memory from `rows` on.
__device__ __forceinline__ void add_products(float (&c)[NT][NG][4], const Query &q, u32 rows, int g, int t) {
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
                mma<true>(c[n][j * NG / 8], upper[j], lower[j], upper[j + 1], lower[j + 1], q.f[n][8 * r + j], q.f[n][8 * r + j + 1]);
    }
}

// sums.o += b (offset + code) for 16 values, likewise, and sums.p += b.
__device__ __forceinline__ void add_values(Sums &sums, const u32 (&b)[NT][NG][2], u32 rows, int g, int t) {
    constexpr u32 ONES = 0x3F803F80u;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int a = 0; a < NG; a++) mma<false>(sums.p[n][a], ONES, ONES, ONES, ONES, b[n][a][0], b[n][a][1]);
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
                    mma<false>(sums.o[n][8 * v + j], x01[j], y01[j], x23[j], y23[j], b[n][j * NG / 8][0], b[n][j * NG / 8][1]);
        } else {
            Bf16Codes x01(x[0] | x[1] << 16), x23(x[2] | x[3] << 16);
#pragma unroll
            for (int j = 0; j < 8; j += 2)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    mma<false>(sums.o[n][4 * v + j / 2], x01[j], x01[j + 1], x23[j], x23[j + 1], b[n][j * NG / 8][0], b[n][j * NG / 8][1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attend(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) u8 shared[];  // the warps' rings of tiles; afterwards their outputs
    constexpr int PITCH = D + 8;
    __shared__ __align__(16) u16 q_half[ROWS][PITCH], q_bf16[BF16 ? ROWS : 1][PITCH];
    u16(*q_native)[PITCH] = BF16 ? q_bf16 : q_half;  // in the cache's dtype
    __shared__ float q_factor[ROWS], q_sum[NG][ROWS], q_start[NG][ROWS];
    __shared__ float all_m[WARPS][ROWS], all_l[WARPS][ROWS];

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int bh = blockIdx.x, split = blockIdx.y, batch = bh / p.heads, row0 = blockIdx.z * ROWS;
    const int rows = min(ROWS, p.rows - row0);

    // Which positions stand where.
    const int end = p.state[0];  // of what was appended: the fresh tokens may be there already or not
    const int fresh_start = p.fresh_count ? (int)p.fresh_at[0] : end, last = fresh_start + p.fresh_count;
    const int seen_end = p.length < 0 ? last : MASK || p.fresh_count ? min(p.length, last) : p.length;
    const int stored = p.fresh_count ? min(seen_end, fresh_start) : seen_end;  // so many of them in the cache
    const int ring_end = min(end, stored), ring_start = p.window ? min(ring_end, max(p.state[1], end - p.window)) : ring_end;
    const int body_end = ring_end == stored ? ring_start : stored;
    const int pivot = lane < p.pivots ? p.pivot_at[batch * p.pivots + lane] : -1;
    const long long mask_base = batch * p.mask_b + (bh % p.heads) * (p.rows / p.queries) * p.mask_h;

    // This warp's share. A tile of tokens at 16 bits costs about as much as WIDE_COST tiles of the body, so who has one more of those
    // gets fewer of these.
    const int workers = p.splits * WARPS, worker = split * WARPS + warp;
    const int ring_tiles = (p.window + 15) / 16, pivot_tiles = (p.pivots + 15) / 16, fresh_tiles = (p.fresh_count + 15) / 16;
    const int wide_tiles = ring_tiles + pivot_tiles + fresh_tiles;
    const int text_slots = TEXT_BITS ? min(max(end + p.state[2], 0), p.text_capacity) : 0;
    const int tiles = (body_end + TILE - 1) / TILE, last_start = max(body_end - TILE, 0);
    // text tiles go round after the wide ones; a worker takes its own before its share of the body, counted down to where that begins
    const int text_tiles = (text_slots + TILE - 1) / TILE, text_begin = (worker - wide_tiles % workers + workers) % workers;
    const int text_count = text_begin < text_tiles ? (text_tiles - text_begin - 1) / workers + 1 : 0;
    const int extra = (wide_tiles + text_tiles) % workers;
    constexpr int WIDE_COST = 2;
    const float share = max((float)(tiles - WIDE_COST * (extra ? workers - extra : 0)), 0.f) / workers;
    const float more = extra ? fminf(WIDE_COST, (tiles - share * workers) / (workers - extra)) : 0.f;
    const int body_first = min((int)(share * worker + more * max(worker - extra, 0) + 0.5f), tiles);
    int number = body_first - text_count;
    const int last_tile = worker + 1 == workers ? tiles : min((int)(share * (worker + 1) + more * max(worker + 1 - extra, 0) + 0.5f), tiles);
    const Stream stream(p, (long long)bh * p.capacity, (u32)__cvta_generic_to_shared(shared) + warp * STAGES * STAGE_BYTES, lane);
    auto text_slot = [&](int tile) { return (text_begin + (tile - body_first + text_count) * workers) * TILE + lane; };
    auto text_position = [&](int tile) {
        const int slot = tile < body_first ? text_slot(tile) : text_slots;
        return slot < text_slots ? p.text_at[(long long)batch * p.text_capacity + slot] : -1;
    };
    int position_ahead = TEXT_BITS ? text_position(number) : -1;  // of the text tile to be fetched next: codes need not wait for it
    auto fetch = [&](int stage, int tile) {
        if (!TEXT_BITS || tile >= body_first) {
            stream.fetch(stage, min(tile * TILE, last_start));
            return;
        }
        int position = position_ahead;
        position_ahead = text_position(tile + 1);
        if (position >= stored || (position >= ring_start && position < ring_end)) position = -1;
        for (int i = 0; i < p.pivots; i++)
            if (position == __shfl_sync(ALL, pivot, i)) position = -1;  // a pivot is read from its overlay
        if (MASK == 1 && position >= 0 && !((const u8 *)p.mask)[mask_base + position * p.mask_t]) position = -1;
        stream.gather(stage, p, bh, text_slot(tile) - lane, position);
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (number + i < last_tile) fetch(i, number + i);
        stream.commit();
    }

    // The queries of this block: a power of two per row brings them into fp16's range and loses nothing.
    for (int row = warp; row < ROWS; row += WARPS) {
        float x[OWN], top = 0.f, sum[NG] = {}, start[NG] = {};
        const u16 *from = p.q + ((long long)bh * p.rows + row0 + row) * D;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int channel = lane + 32 * i;
            x[i] = row < rows && channel < D ? to_float(from[channel]) : 0.f;
        }
        if (p.turn) turn_query(x, p.affine ? p.affine + ((batch * 2LL + 1) * p.heads + bh % p.heads) * D : nullptr, lane);
#pragma unroll
        for (int i = 0; i < OWN; i++) top = fmaxf(top, fabsf(x[i]));
#pragma unroll
        for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, i));
        const u32 exponent = __float_as_uint(top) >> 23;  // 0 for zero, 255 for inf
        const float unit = __uint_as_float(min(max(exponent, 1u), 253u) << 23), inverse = 1.f / unit;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int channel = lane + 32 * i;
            u16 h = (u16)pack_half(x[i] * inverse, 0.f);
            if (channel < D) {
                q_half[row][channel] = h;
                if (BF16) q_native[row][channel] = (u16)pack_bf16(x[i] * inverse, 0.f);
                const int j = channel / W;
                const float offset = HalfCodes::offset(j);
#pragma unroll
                for (int a = 0; a < NG; a++)
                    if (j * NG / 8 == a) sum[a] += half_to_float(h), start[a] -= offset * half_to_float(h);
            }
        }
#pragma unroll
        for (int a = 0; a < NG; a++)
#pragma unroll
            for (int i = 16; i; i /= 2) {
                sum[a] += __shfl_xor_sync(ALL, sum[a], i);
                start[a] += __shfl_xor_sync(ALL, start[a], i);
            }
        if (lane == 0) {
            q_factor[row] = unit * p.scale;
#pragma unroll
            for (int a = 0; a < NG; a++) q_sum[a][row] = sum[a] * unit * p.scale, q_start[a][row] = start[a];
        }
    }
    __syncthreads();

    Query q;
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int word = key_word(t, i / 8);
            q.f[n][i] = word < W && row_of(n, g) >= 0 ? *(const u32 *)&q_half[row_of(n, g)][(i % 8) * W + word] : 0;
        }
#pragma unroll
        for (int c = 0; c < CC; c++) {
            const int row = row_of(n, 2 * t + c);
            q.factor[n][c] = q_factor[row];
#pragma unroll
            for (int a = 0; a < NG; a++) q.sum[n][a][c] = q_sum[a][row], q.start[n][a][c] = q_start[a][row];
        }
    }

    Sums sums;
    sums.clear();

    // Tokens kept at 16 bits: 16 at a time, first the ring, then the pivots, then this step's own.
    for (int i = worker; i < wide_tiles; i += workers) {
        const u16 *keys, *values;
        int slot = lane & 15, position, count;
        if (i < ring_tiles) {
            slot += 16 * i, count = p.window, keys = p.key.ring, values = p.value.ring;
            int behind = (end - 1 - slot) % p.window;
            position = end - 1 - (behind < 0 ? behind + p.window : behind);
            if (slot >= p.window || position < ring_start || position >= ring_end) position = -1;
        } else if (i < ring_tiles + pivot_tiles) {
            slot += 16 * (i - ring_tiles), count = p.pivots, keys = p.key.pivots, values = p.value.pivots;
            position = __shfl_sync(ALL, pivot, min(slot, 31));
            if (slot >= count || position >= stored || (position >= ring_start && position < ring_end)) position = -1;
        } else {
            slot += 16 * (i - ring_tiles - pivot_tiles), count = p.fresh_count, keys = p.key.fresh, values = p.value.fresh;
            position = slot < count && fresh_start + slot < seen_end ? fresh_start + slot : -1;
        }
        bool seen = position >= 0;
        if (seen && MASK == 1) seen = ((const u8 *)p.mask)[mask_base + position * p.mask_t];
        const u32 live = __ballot_sync(ALL, seen) & 0xffffu;
        if (!live) continue;
        keys += (long long)bh * count * D, values += (long long)bh * count * D;
        const int base = slot - (lane & 15);

        float s[1][NT][2][CC], c[NT][4] = {};
        bool row_live[2];
#pragma unroll
        for (int half = 0; half < 2; half++) row_live[half] = live >> (token_of_row(g) + 8 * half) & 1;
        // all loads set out together: 8 channels of two keys at a time, and of four values what this lane's accumulators stand for
        uint4 key[(D + 31) / 32][2];
        u32 wide[OT][PAIRED ? 1 : 2][4];
#pragma unroll
        for (int i_ = 0; i_ < (D + 31) / 32; i_++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = token_of_row(g) + 8 * half, channel = 8 * (t + 4 * i_);
                key[i_][half] = {};
                if (row_live[half] && channel < D) key[i_][half] = __ldg((const uint4 *)(keys + (long long)(base + row) * D + channel));
            }
#pragma unroll
        for (int y = 0; y < 4; y++) {
            const u16 *value = values + (long long)(base + 4 * y + t) * D;
#pragma unroll
            for (int o = 0; o < OT; o++)
#pragma unroll
                for (int half = 0; half < (PAIRED ? 1 : 2); half++) {
                    const int word = value_word(g, PAIRED ? o / 8 : o / 4), j = PAIRED ? o % 8 : 2 * (o % 4) + half;
                    wide[o][half][y] = 0;
                    if (live >> (4 * y + t) & 1 && word < W)
                        wide[o][half][y] = PAIRED ? __ldg((const u32 *)(value + j * W + word)) : __ldg(value + j * W + word);
                }
        }
#pragma unroll
        for (int i_ = 0; i_ < (D + 31) / 32; i_++)
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 x = {};
                if (8 * (t + 4 * i_) < D && row_of(n, g) >= 0) x = *(const uint4 *)&q_native[row_of(n, g)][8 * (t + 4 * i_)];
                const uint4 upper = key[i_][0], lower = key[i_][1];
                mma<!BF16>(c[n], upper.x, lower.x, upper.y, lower.y, x.x, x.y);
                mma<!BF16>(c[n], upper.z, lower.z, upper.w, lower.w, x.z, x.w);
            }
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int x = 0; x < CC; x++) {
                    s[0][n][half][x] = row_live[half] ? c[n][2 * half + x] * q.factor[n][x] : -INFINITY;
                    if (MASK == 2) {
                        int at = __shfl_sync(ALL, position, token_of_row(g) + 8 * half), row = row0 + row_of(n, 2 * t + x);
                        if (row_live[half] && row < p.rows)
                            s[0][n][half][x] += load_mask(p, mask_base + row / p.queries * p.mask_h + row % p.queries * p.mask_q + at * p.mask_t);
                    }
                }
        sums.to_weights(s);
        u32 b[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            b[n][0] = transpose(pack_native(s[0][n][0][0], CC == 2 ? s[0][n][0][CC - 1] : 0.f));
            b[n][1] = transpose(pack_native(s[0][n][1][0], CC == 2 ? s[0][n][1][CC - 1] : 0.f));
        }
#pragma unroll
        for (int o = 0; o < OT; o++) {
            u32 a[4];
            if (PAIRED) {
                a[0] = __byte_perm(wide[o][0][0], wide[o][0][1], 0x5410), a[1] = __byte_perm(wide[o][0][0], wide[o][0][1], 0x7632);
                a[2] = __byte_perm(wide[o][0][2], wide[o][0][3], 0x5410), a[3] = __byte_perm(wide[o][0][2], wide[o][0][3], 0x7632);
            } else {
#pragma unroll
                for (int half = 0; half < 2; half++)
                    a[half] = wide[o][half][0] | wide[o][half][1] << 16, a[half + 2] = wide[o][half][2] | wide[o][half][3] << 16;
            }
#pragma unroll
            for (int n = 0; n < NT; n++) mma<!BF16>(sums.o[n][o], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
        }
    }

    // The body at 2 bits.
    const int plain_end = ring_start < ring_end ? min(body_end, ring_start) : body_end;
    const u8 *mask = (const u8 *)p.mask + mask_base;
    auto seen_by_all = [&](int tile, int x) {  // this lane's position of a tile, from x on: loaded a tile ahead, like the codes
        const int position = min(tile * TILE, last_start) + x + lane;
        return tile >= body_first && tile < last_tile && position < body_end ? mask[position * p.mask_t] : 0;
    };
    u8 ahead[TILE / 32], now[TILE / 32];
    if (MASK == 1) {
#pragma unroll
        for (int x = 0; x < TILE; x += 32) ahead[x / 32] = seen_by_all(number, x);
    }
#if TEXT_BITS
    auto in_overlay = [&](int tile, int x) {  // this lane's position of a tile is read from the text overlay: likewise a tile ahead
        const int position = min(tile * TILE, last_start) + x + lane;
        return tile >= body_first && tile < last_tile && position < body_end && p.classes[(long long)batch * p.capacity + position] == TEXT;
    };
    bool text_ahead[TILE / 32], text[TILE / 32];
#pragma unroll
    for (int x = 0; x < TILE; x += 32) text_ahead[x / 32] = in_overlay(number, x);
#endif
    for (int stage = 0; number < last_tile; number++, stage = stage + 1 == STAGES ? 0 : stage + 1) {
        // the last tile ends with the body and may begin among tokens of the one before, which it does not count again
        const int first = min(number * TILE, last_start);
        const bool is_text = TEXT_BITS && number < body_first;
        Stream::wait<STAGES - 2>();
        __syncwarp();
        if (number + STAGES - 1 < last_tile)
            fetch(stage == 0 ? STAGES - 1 : stage - 1, number + STAGES - 1);
        Stream::commit();
        const u32 codes = stream.at(stage), ranges = codes + 2 * CODE_BYTES;
        if (MASK == 1) {
#pragma unroll
            for (int x = 0; x < TILE; x += 32) now[x / 32] = ahead[x / 32], ahead[x / 32] = seen_by_all(number + 1, x);
        }

        constexpr u64 FULL = ~0ull >> (64 - TILE);
        u64 live = FULL, elsewhere = 0;
#if TEXT_BITS
#pragma unroll
        for (int x = 0; x < TILE; x += 32) {
            text[x / 32] = text_ahead[x / 32], text_ahead[x / 32] = in_overlay(number + 1, x);
            elsewhere |= (u64)__ballot_sync(ALL, text[x / 32]) << x;
        }
#endif
        u32 found = __ballot_sync(ALL, pivot >= first && pivot < first + TILE);
        if (is_text) {
            live = __ballot_sync(ALL, read_int(codes + POSITIONS + lane * 4) >= 0);
        } else if (MASK == 1 || found || elsewhere || first + TILE > plain_end || first < number * TILE) {
            live = bits_between(first, number * TILE, body_end) & ~elsewhere;
            if (body_end > ring_start) live &= ~bits_between(first, ring_start, ring_end);
            while (found) {
                live &= ~(1ull << (__shfl_sync(ALL, pivot, __ffs(found) - 1) - first));
                found &= found - 1;
            }
            if (MASK == 1) {
#pragma unroll
                for (int x = 0; x < TILE; x += 32) live &= (u64)__ballot_sync(ALL, now[x / 32]) << x | ~((u64)ALL << x);
            }
        }

        float s[MT][NT][2][CC];
        float scales[MT][2][NG];  // of the values
        float lows[MT][2][NG];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float c[NT][NG][4];
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int a = 0; a < NG; a++)
#pragma unroll
                    for (int x = 0; x < 4; x++) c[n][a][x] = (x & 1) < CC ? q.start[n][a][(x & 1) % CC] : 0.f;
            add_products(c, q, codes + 16 * m * (W * 2), g, t);
            if (is_text) {  // upper bits weigh four times the lower
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int a = 0; a < NG; a++)
#pragma unroll
                        for (int x = 0; x < 4; x++) c[n][a][x] = 4.f * c[n][a][x] + ((x & 1) < CC ? q.start[n][a][(x & 1) % CC] : 0.f);
                add_products(c, q, codes + KEY_LOWER + 16 * m * (W * 2), g, t);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 range[NG];
                const int token = 16 * m + 8 * half + token_of_row(g);
                read_shared(range, ranges + token * NG * 4);
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int x = 0; x < CC; x++) {
                        s[m][n][half][x] = 0.f;
#pragma unroll
                        for (int a = 0; a < NG; a++)
                            s[m][n][half][x] += c[n][a][2 * half + x] * scale_of(range, a) * q.factor[n][x] + minimum_of(range, a) * q.sum[n][a][x];
                    }
                read_shared(range, ranges + RANGE_BYTES + token * NG * 4);
#pragma unroll
                for (int a = 0; a < NG; a++) scales[m][half][a] = scale_of(range, a), lows[m][half][a] = minimum_of(range, a);
            }
        }
        if (MASK == 2) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
#pragma unroll
                        for (int x = 0; x < CC; x++) {
                            const int token = 16 * m + token_of_row(g) + 8 * half, row = row0 + row_of(n, 2 * t + x);
                            const int at = is_text ? read_int(codes + POSITIONS + token * 4) : first + token;
                            if ((is_text ? at >= 0 : at < body_end) && row < p.rows)
                                s[m][n][half][x] += load_mask(p, mask_base + row / p.queries * p.mask_h + row % p.queries * p.mask_q + at * p.mask_t);
                        }
        }
        if (live != FULL) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (!(live >> (16 * m + token_of_row(g) + 8 * half) & 1)) {  // not counted, even where its range is NaN
#pragma unroll
                        for (int n = 0; n < NT; n++)
#pragma unroll
                            for (int x = 0; x < CC; x++) s[m][n][half][x] = -INFINITY;
#pragma unroll
                        for (int a = 0; a < NG; a++) scales[m][half][a] = lows[m][half][a] = 0.f;
                    }
        }
        sums.to_weights(s);
        const bool whole = VALUE_TEXT_BITS && is_text;  // values have lower bits too
#pragma unroll
        for (int m = 0; m < MT; m++) {
            u32 b[NT][NG][2];
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int a = 0; a < NG; a++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float weighted[2] = {0.f, 0.f};
#pragma unroll
                        for (int x = 0; x < CC; x++) {
                            weighted[x] = s[m][n][half][x] * scales[m][half][a];
                            sums.low[n][a][x] += s[m][n][half][x] * lows[m][half][a];
                        }
                        b[n][a][half] = transpose(pack_bf16(weighted[0], weighted[1]));
                    }
                }
            add_values(sums, b, codes + (whole ? VALUE_LOWER : CODE_BYTES) + 16 * m * (W * 2), g, t);
            if (whole) {
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int a = 0; a < NG; a++)
#pragma unroll
                        for (int half = 0; half < 2; half++) b[n][a][half] = four_times(b[n][a][half]);
                add_values(sums, b, codes + CODE_BYTES + 16 * m * (W * 2), g, t);
            }
        }
    }

    // Warps of the block, then splits.
    Stream::wait<0>();
    __syncthreads();  // the rings' room is taken over
    float(*all_o)[ROWS][D] = (float(*)[ROWS][D])shared;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < CC; c++) {
            const int row = row_of(n, 2 * t + c);
            float l = sums.l[n][c], low[NG];
#pragma unroll
            for (int i = 4; i < 32; i *= 2) l += __shfl_xor_sync(ALL, l, i);
#pragma unroll
            for (int a = 0; a < NG; a++) {
                low[a] = sums.low[n][a][c];
#pragma unroll
                for (int i = 4; i < 32; i *= 2) low[a] += __shfl_xor_sync(ALL, low[a], i);
            }
            if (row < rows) {
                if (g == 0) all_m[warp][row] = sums.m[n][c], all_l[warp][row] = l;
#pragma unroll
                for (int o = 0; o < OT; o++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int j = PAIRED ? o % 8 : 2 * (o % 4) + half, a = j * NG / 8;
                        int word = PAIRED ? value_word(g, o / 8) + half : value_word(g, o / 4);
                        float x = sums.o[n][o][2 * half + c] - Bf16Codes::offset(j) * sums.p[n][a][c] + low[a];
                        if (word < W) all_o[warp][row][j * W + word] = x;
                    }
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * D; i += 32 * WARPS) {
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
        const long long place = (long long)bh * p.rows + row0 + row;
        if (p.splits == 1) {
            o = l == 0.f ? 0.f : o / l;
            if (p.restore) all_o[0][row][channel] = o;  // which this thread alone has read
            else p.out[place * D + channel] = (u16)pack_native(o, 0.f);
        } else {
            p.part_o[(place * p.splits + split) * D + channel] = o;
            if (channel == 0) p.part_ml[(place * p.splits + split) * 2] = top, p.part_ml[(place * p.splits + split) * 2 + 1] = l;
        }
    }
    if (p.splits == 1 && p.restore) {
        __syncthreads();
        for (int row = warp; row < rows; row += WARPS)
            write_restored(p.out + ((long long)bh * p.rows + row0 + row) * D, all_o[0][row], lane);
    }
}

// One block a row: 8 warps take the splits in turn, a lane four channels at a time.
extern "C" __global__ void __launch_bounds__(256) combine(const __grid_constant__ Params p) {
    constexpr int LANES = D / 4, PARTS = (LANES + 31) / 32, MOST = SPLITS_MAX / 32;
    __shared__ float4 all_o[8][LANES];
    const long long row = blockIdx.x;
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
#pragma unroll
    for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, i));
    const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int i = 0; i < MOST; i++) own[i].x = exp2_fast(own[i].x - shift), l += own[i].x * own[i].y;
#pragma unroll
    for (int i = 16; i; i /= 2) l += __shfl_xor_sync(ALL, l, i);
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
        if (p.restore) ((float *)all_o[0])[threadIdx.x] = out;  // which this thread alone has read
        else p.out[row * D + threadIdx.x] = (u16)pack_native(out, 0.f);
    }
    if (p.restore) {
        __syncthreads();
        if (warp == 0) write_restored(p.out + row * D, (const float *)all_o[0], lane);
    }
}
