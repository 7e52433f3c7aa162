// What attend_cpu.cpp works on: numbers, packed tokens in tiles, and from where each position is read.
//
// A tile has a token per vector lane. A 32-bit column of codes gives 32 / bits channels by masking alone: a masked code
// is still shifted, that is times a power of two, and that factor is divided out of the query (exactly) or of the
// finished sum. So a code costs an and, a conversion and one multiply-add per query row:
//     score = scale * sum_j(q_j code_j) + min * sum_j(q_j)      out_j = sum_t(p_t scale_t code_tj) + sum_t(p_t min_t)
// Where levels are symmetric, min is -scale * (2^bits - 1) / 2. An uneven token is D slots of 2 bits in two groups: the
// query asks them with (4 q, q) of the first part, for high and low codes, and with q of the middle.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#include "numbers_cpu.h"

// Mirrored by attend_cpu.py. Absent buffers are null and their sizes 0.
struct Cache {
  const int32_t* state;
  const uint16_t* codes;
  const uint16_t* range;
  const void* ring;
  const void* pivots;
  const int32_t* pivot_at;
  const uint16_t* text_codes;
  const int32_t* text_at;
  const void* means;  // of blocks of keys; null: codes hold the tokens themselves
  const uint16_t* affine;
  const void* fresh;  // [B, H, fresh_count, D] in the cache's dtype
  int64_t dtype, head_dim, groups, capacity, bits, window, pivot_count, text_bits, low_width, text_capacity;
  int64_t symmetric, uneven, block;
};

struct Call {
  const void* q;  // [B, Hq, tokens, D]
  void* out;      // [B, Hq, tokens, Dv]
  const void* mask;
  const int64_t* at;  // [fresh_count]
  const float* sinks;  // [Hq], null for none
  int64_t q_dtype, mask_dtype, mask_stride[4];
  int64_t batch, heads, query_heads, tokens;
  int64_t length;  // < 0: read from state
  int64_t fresh_count, is_causal, rotate, restore, threads;
  double scale, softcap;  // softcap: 0 for none
};

namespace {

enum Status { DONE, NO_MEMORY, BAD_POSITION };
enum State { END, RING };
enum Affine { CENTRE, GAIN, ORDER };  // rows of the map
enum Kind { BODY, TEXT, DENSE, KINDS };

#if defined(__AVX512F__)
constexpr int LANES = 16, ACCUMULATORS = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, ACCUMULATORS = 8;
#elif defined(__aarch64__)
constexpr int LANES = 4, ACCUMULATORS = 16;
#else
constexpr int LANES = 4, ACCUMULATORS = 8;
#endif
constexpr int BLOCK = 4 * LANES;                // tokens of a tile are padded to a multiple of it
constexpr int64_t CHUNK = 512, CHUNK_MIN = 64;  // positions: a tile of 2-bit codes for 128 channels takes 16 KiB
constexpr int64_t CHUNK_ROWS = 32;              // rows from which chunks shrink, so that scores stay in the cache
constexpr int64_t PAD = 16;                     // keeps the columns of a tile off the same cache set
constexpr int64_t WORK_PER_THREAD = 1 << 18;    // multiply-adds that pay for waking another thread
constexpr int64_t ALONE = 1 << 16;              // up to so many steps of a small loop one thread is faster
constexpr int64_t UNITS_PER_THREAD = 4;         // shares of the work, so that a slow thread does not hold up the others
constexpr int64_t PREFETCH = 48, LINE = 32;      // tokens ahead; 16-bit words of a cache line
constexpr int SKIP = 4;  // codes of a column; skipped together where none of their channels is in the group
constexpr float FP16_MAX = 65504.0f, INFINITE = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

template <class V, class T>
inline V load(const T* from) {
  V out;
  std::memcpy(&out, from, sizeof(V));
  return out;
}
template <class V, class T>
inline void store(T* to, V from) { std::memcpy(to, &from, sizeof(V)); }

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <int N>
inline float total_of(const float* lane) {
  if constexpr (N == 1) return lane[0];
  else {
    float half[N / 2];
    for (int i = 0; i < N / 2; i++) half[i] = lane[i] + lane[i + N / 2];
    return total_of<N / 2>(half);
  }
}
inline float total(Floats x) {
  float lane[LANES];
  store(lane, x);
  return total_of<LANES>(lane);
}

// The totals of LANES vectors in one: each step folds two vectors of segments of M lanes into one of segments of M / 2.
#if defined(__clang__) || __GNUC__ >= 12
template <int M, int... I>
inline Floats fold(Floats x, Floats y, std::integer_sequence<int, I...>) {
  constexpr auto from = [](int i) { return i / (LANES / 2) * LANES + i % (LANES / 2) / (M / 2) * M + i % (M / 2); };
  return __builtin_shufflevector(x, y, from(I)...) + __builtin_shufflevector(x, y, (from(I) + M / 2)...);
}
template <int M = LANES>
inline Floats totals(const Floats* x) {
  if constexpr (M == 1) return *x;
  else return fold<2 * LANES / M>(totals<M / 2>(x), totals<M / 2>(x + M / 2), std::make_integer_sequence<int, LANES>());
}
#else
inline Floats totals(const Floats* x) {
  float out[LANES];
  for (int i = 0; i < LANES; i++) out[i] = total(x[i]);
  return load<Floats>(out);
}
#endif

// exp(x) for x <= 0, but never below the smallest normal float: every token that is seen keeps some weight, so that
// inf or NaN in its value reaches the sum, as in torch. NaN stays NaN.
inline Floats exponential(Floats x) {
  const Floats log2e = Floats{} + 1.44269504f, lowest = Floats{} - 126.0f, magic = Floats{} + 12582912.0f;
  Floats y = x * log2e;
  y = y < lowest ? lowest : y;
  const Floats whole = (y + magic) - magic, f = y - whole;
  Floats p = Floats{} + 1.535336188e-4f;  // 2^f on [-0.5, 0.5]: Cephes' exp2f
  for (float c : {1.339887440e-3f, 9.618437357e-3f, 5.550332548e-2f, 2.402264791e-1f, 6.931472028e-1f, 1.0f})
    p = p * f + c;
  return p * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
}

// tanh by exp(-2 |x|). Near 0 it is off by an ulp of 1, not of itself, as scores that are capped may be.
inline Floats hyperbolic_tangent(Floats x) {
  const Floats one = Floats{} + 1.0f, size = x < Floats{} ? -x : x;
  const Floats e = exponential(-2.0f * size), y = (one - e) / (one + e);
  return x < Floats{} ? -y : y;
}

// Code `s` of each 32-bit column, times 1 / weight(s).
template <int BITS>
inline Floats code(Words w, int s) {
  constexpr uint32_t TOP = (1u << BITS) - 1;
  const Words kept = s == 32 / BITS - 1 ? w >> (32 - BITS) : w & (TOP << (BITS * s));
  return __builtin_convertvector((Ints)kept, Floats);
}
template <int BITS>
constexpr float weight(int s) { return s == 32 / BITS - 1 ? 1.0f : 1.0f / (1u << (BITS * s)); }

// Or the [D] codes of [D * bits / 16] words, shifted left by `up`, into `out`.
inline void unpack_over(const uint16_t* words, int64_t head_dim, int64_t bits, int64_t up, uint8_t* out) {
  const int64_t count = head_dim * bits / 16;
  for (int64_t s = 0; s < 16 / bits; s++)
    for (int64_t w = 0; w < count; w++) out[s * count + w] |= (words[w] >> bits * s & ((1 << bits) - 1)) << up;
}

// Walsh-Hadamard rotation of a row, as in kernels/rotate.py: in blocks of `order` channels, the largest power of two
// that divides the head dim. Within a vector it is a product with the entries of H, between vectors it is butterflies.
struct Rotation {
  int64_t order;
  float entries[LANES][LANES];  // of H; symmetric

  explicit Rotation(int64_t head_dim) : order(head_dim & -head_dim) {
    const float norm = 1.0f / std::sqrt(float(order));
    for (int i = 0; i < LANES; i++)
      for (int j = 0; j < LANES; j++)
        entries[i][j] = i / order != j / order ? 0.0f : __builtin_popcount(i & j & (order - 1)) & 1 ? -norm : norm;
  }

  void apply(float* row, int64_t head_dim) const {
    for (int64_t from = 0; from < head_dim; from += LANES) {
      const int64_t count = std::min<int64_t>(LANES, head_dim - from);
      Floats sum = {};
      for (int64_t i = 0; i < count; i++) sum += load<Floats>(entries[i]) * row[from + i];
      std::memcpy(row + from, &sum, 4 * count);
    }
    for (int64_t step = LANES; step < order; step *= 2)
      for (int64_t from = 0; from < head_dim; from += 2 * step)
        for (int64_t j = from; j < from + step; j += LANES) {
          const Floats x = load<Floats>(row + j), y = load<Floats>(row + j + step);
          store(row + j, x + y), store(row + j + step, x - y);
        }
  }
};

// One packed source of one head: the body, or text, whose codes have their lower bits in an overlay.
struct Packed {
  const uint16_t *codes, *range, *lower;  // lower: null for the body
  int64_t bits, head_dim, groups, body_bits, low_width;
  bool half;       // codes are read as fp16
  bool symmetric;  // a range is scales alone
  int64_t range_size() const { return symmetric ? groups : 2 * groups; }
  int64_t words() const { return head_dim * bits / 16; }
  int64_t columns() const { return (words() + 1) / 2; }
  int64_t per_column() const { return 32 / bits; }
  int64_t channel(int64_t column, int64_t s) const {  // -1: padding
    const int64_t in_word = per_column() / 2, word = 2 * column + s / in_word;
    return word < words() ? s % in_word * words() + word : -1;
  }
  int64_t group_of(int64_t channel) const { return channel / (head_dim / groups); }
  // The words of a text token that stands at `place` of the body and in `slot` of the overlay.
  [[gnu::noinline]] void join(int64_t place, int64_t slot, uint8_t* code, uint16_t* out) const {
    std::memset(code, 0, head_dim), std::memset(out, 0, 2 * words());
    unpack_over(codes + place * (head_dim * body_bits / 16), head_dim, body_bits, bits - body_bits, code);
    unpack_over(lower + slot * (head_dim * low_width / 16), head_dim, low_width, 0, code);
    for (int64_t s = 0; s < 16 / bits; s++)
      for (int64_t w = 0; w < words(); w++) out[w] |= uint16_t(code[s * words() + w]) << bits * s;
  }
};

// Tokens of one packed source in one chunk, a token per lane.
struct Tile {
  uint32_t* columns;      // [columns][stride]
  float *scale, *lowest;  // [groups][stride]
  float* rows;            // [groups * R][stride], products or weights
  uint8_t* code;          // [D] and
  uint16_t* joined;       // [words] of one text token
  int64_t stride, count, padded;

  // place: of n tokens, counted from `first`; slot: of the body, the same counted from 0, of text those of the overlay
  void fill(const Packed& source, const int32_t* slot, const int32_t* place, int64_t first, int64_t n) {
    if (source.lower) fill_with<true>(source, slot, place, first, n);
    else fill_with<false>(source, slot, nullptr, 0, n);
  }

  // Not inlined: inlined side by side, the loops over text and over the body compile to slower code, by 4 % of a call.
  template <bool TEXT>
  [[gnu::noinline]] void fill_with(const Packed& source, const int32_t* slot, const int32_t* place, int64_t first,
                                   int64_t n) {
    count = n, padded = round_up(n, BLOCK);
    const int64_t words = source.words(), groups = source.groups, size = source.range_size(), step = stride;
    const int64_t stored = TEXT ? source.head_dim * source.body_bits / 16 : words;  // words of a token in the body
    const uint16_t *codes = source.codes, *ranges = source.range;
    const auto body = [&](int64_t t) -> int64_t { return TEXT ? first + place[t] : slot[t]; };
    for (int64_t t = -PREFETCH; t < n; t++) {
      if (t + PREFETCH < n) {  // slots may lie apart, where the processor's own prefetching does not help
        const int64_t next = body(t + PREFETCH);
        for (int64_t w = 0; w < stored; w += LINE) __builtin_prefetch(codes + next * stored + w);
        __builtin_prefetch(ranges + next * size);
      }
      if (t < 0) continue;
      if (TEXT) source.join(body(t), slot[t], code, joined);
      const uint16_t* from = TEXT ? joined : codes + slot[t] * words;
      uint32_t* to = columns + t;
      int64_t c = words;
      for (; c >= 4; c -= 4, from += 4, to += 2 * step) {
        uint64_t two;
        std::memcpy(&two, from, 8);
        to[0] = uint32_t(two), to[step] = uint32_t(two >> 32);
      }
      if (c >= 2) std::memcpy(to, from, 4), c -= 2, from += 2, to += step;
      if (c) *to = *from;
    }
    for (int64_t c = 0; c < source.columns(); c++)
      std::fill(columns + c * step + n, columns + c * step + padded, 0u);
    for (int64_t g = 0; g < groups; g++) {
      float *s = scale + g * step, *m = lowest + g * step;
      uint32_t* both = reinterpret_cast<uint32_t*>(rows);
      const int64_t minimum = source.symmetric ? 0 : groups;
      for (int64_t t = 0; t < n; t++) {
        const uint16_t* r = ranges + body(t) * size + g;
        both[t] = r[0] | uint32_t(r[minimum]) << 16;
      }
      for (int64_t t = 0; t < n; t++) s[t] = from_half(both[t] & 0xffff), m[t] = from_half(both[t] >> 16);
      const float middle = ((1 << source.bits) - 1) * 0.5f;
      for (int64_t t = 0; source.symmetric && t < n; t++) m[t] *= -middle;
      // minimum + scale * code may exceed fp16, since scale is rounded; inf and NaN stay
      for (int64_t t = 0; source.half && !source.symmetric && t < n; t++) {
        const float most = (FP16_MAX - m[t]) / ((1 << source.bits) - 1);
        s[t] = s[t] > most && s[t] < INFINITE ? most : s[t];
      }
      std::fill(s + n, s + padded, 0.0f), std::fill(m + n, m + padded, 0.0f);
    }
  }
};

// Whether any channel of group g is among codes [s, s + SKIP) of a column: [groups][columns][per_column / SKIP].
void find_used(const Packed& source, uint8_t* used) {
  const int64_t spans = source.per_column() / SKIP, size = source.columns() * spans;
  std::memset(used, 0, source.groups * size);
  for (int64_t c = 0; c < source.columns(); c++)
    for (int64_t s = 0; s < source.per_column(); s++)
      if (const int64_t j = source.channel(c, s); j >= 0) used[source.group_of(j) * size + c * spans + s / SKIP] = 1;
}

// Of each code of a token's columns: its channel, its group (-1: padding), and by what the query is multiplied for it.
struct Place {
  int32_t channel, group;
  float weight;
};

void find_places(const Packed& source, Place* out) {
  const int64_t count = source.per_column();
  for (int64_t c = 0; c < source.columns(); c++)
    for (int64_t s = 0; s < count; s++) {
      const int64_t j = source.channel(c, s);
      const float weight = s == count - 1 ? 1.0f : std::ldexp(1.0f, -int(s * source.bits));
      *out++ = {int32_t(j), j < 0 ? -1 : int32_t(source.group_of(j)), weight};
    }
}

template <int BITS, int ROWS, int VECTORS>
void dot(const Tile& tile, int64_t columns, const float* q, const uint8_t* used, float* out) {
  constexpr int CODES = 32 / BITS;
  for (int64_t t = 0; t < tile.padded; t += LANES * VECTORS) {
    Floats sum[ROWS][VECTORS] = {};
    for (int64_t c = 0; c < columns; c++) {
      Words w[VECTORS];
      for (int v = 0; v < VECTORS; v++) w[v] = load<Words>(tile.columns + c * tile.stride + t + v * LANES);
#pragma GCC unroll 4
      for (int span = 0; span < CODES / SKIP; span++) {
        if (!used[c * (CODES / SKIP) + span]) continue;
#pragma GCC unroll 4
        for (int s = span * SKIP; s < (span + 1) * SKIP; s++) {
          Floats x[VECTORS];
          for (int v = 0; v < VECTORS; v++) x[v] = code<BITS>(w[v], s);
          for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) sum[r][v] += x[v] * q[(r * columns + c) * CODES + s];
        }
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) store(out + r * tile.stride + t + v * LANES, sum[r][v]);
  }
}

template <int BITS, int ROWS, int FIRST>
void gather_span(const Tile& tile, const Packed& source, int64_t g, int64_t c, const float* p, const uint8_t* used,
                 float* out, int64_t out_stride) {
  constexpr int CODES = 32 / BITS, SPAN = std::min(CODES, ACCUMULATORS / ROWS);
  if (std::any_of(used + FIRST / SKIP, used + (FIRST + SPAN - 1) / SKIP + 1, [](uint8_t u) { return u; })) {
    constexpr int SIZE = (ROWS * SPAN + LANES - 1) / LANES * LANES;
    Floats sum[SIZE] = {};
    for (int64_t t = 0; t < tile.padded; t += LANES) {
      const Words w = load<Words>(tile.columns + c * tile.stride + t);
      Floats weights[ROWS];
      for (int r = 0; r < ROWS; r++) weights[r] = load<Floats>(p + r * tile.stride + t);
#pragma GCC unroll 16
      for (int s = 0; s < SPAN; s++) {
        const Floats x = code<BITS>(w, FIRST + s);
        for (int r = 0; r < ROWS; r++) sum[r * SPAN + s] += x * weights[r];
      }
    }
    float sums[SIZE];
    for (int i = 0; i < SIZE; i += LANES) store(sums + i, totals(sum + i));
    for (int s = 0; s < SPAN; s++) {
      const int64_t channel = source.channel(c, FIRST + s);
      if (channel < 0 || source.group_of(channel) != g) continue;
      for (int r = 0; r < ROWS; r++) out[r * out_stride + channel] += sums[r * SPAN + s] * weight<BITS>(FIRST + s);
    }
  }
  if constexpr (FIRST + SPAN < CODES)
    gather_span<BITS, ROWS, FIRST + SPAN>(tile, source, g, c, p, used, out, out_stride);
}

// Rows are taken 4 at a time, then 2, then 1; all of one channel group.
template <int BITS>
void dot_rows(const Tile& tile, const Packed& source, int64_t rows, const float* q, const uint8_t* used) {
  const int64_t columns = source.columns(), row = columns * (32 / BITS), uses = columns * (32 / BITS / SKIP);
  for (int64_t g = 0; g < source.groups; g++)
    for (int64_t r = 0; r < rows;) {
      float* out = tile.rows + (g * rows + r) * tile.stride;
      const float* from = q + (g * rows + r) * row;
      if (rows - r >= 4) dot<BITS, 4, 2>(tile, columns, from, used + g * uses, out), r += 4;
      else if (rows - r >= 2) dot<BITS, 2, 4>(tile, columns, from, used + g * uses, out), r += 2;
      else dot<BITS, 1, 4>(tile, columns, from, used + g * uses, out), r += 1;
    }
}

template <int BITS>
void gather_rows(const Tile& tile, const Packed& source, int64_t rows, const uint8_t* used, float* out,
                 int64_t stride) {
  const int64_t columns = source.columns(), spans = 32 / BITS / SKIP;
  for (int64_t g = 0; g < source.groups; g++)
    for (int64_t r = 0; r < rows;) {
      const float* p = tile.rows + (g * rows + r) * tile.stride;
      float* to = out + r * stride;
      const int64_t block = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
      for (int64_t c = 0; c < columns; c++) {
        const uint8_t* u = used + (g * columns + c) * spans;
        if (block == 4) gather_span<BITS, 4, 0>(tile, source, g, c, p, u, to, stride);
        else if (block == 2) gather_span<BITS, 2, 0>(tile, source, g, c, p, u, to, stride);
        else gather_span<BITS, 1, 0>(tile, source, g, c, p, u, to, stride);
      }
      r += block;
    }
}

// From where each position is read, chunk by chunk: positions of the body first, then those of text, then dense ones
// (16 bits). Positions count from the first of the chunk. Dense slots count through the ring, then the pivots, then the
// fresh tokens: window + i is pivot i, window + pivot_count + i is fresh token i.
struct Owners {
  int32_t *slot, *position;  // [T]
  int64_t (*count)[KINDS];   // [chunks]

  void find(const Cache& cache, int64_t b, int64_t length, int64_t chunk, const Call& call, int32_t* owner) {
    const int32_t dense = cache.text_capacity;  // owner: -1 body, a text slot, or dense + a dense slot
    std::fill(owner, owner + length, -1);
    const auto place = [&](int64_t at, int64_t who) { if (at >= 0 && at < length) owner[at] = who; };
    for (int64_t i = 0; i < cache.text_capacity; i++) place(cache.text_at[b * cache.text_capacity + i], i);
    for (int64_t i = 0; i < cache.pivot_count; i++)
      place(cache.pivot_at[b * cache.pivot_count + i], dense + cache.window + i);
    if (cache.window) {
      const int64_t end = cache.state[END], first = std::max<int64_t>({cache.state[RING], end - cache.window, 0});
      for (int64_t at = first; at < end; at++) place(at, dense + at % cache.window);
    }
    for (int64_t i = 0; i < call.fresh_count; i++) place(call.at[i], dense + cache.window + cache.pivot_count + i);
    for (int64_t start = 0; start < length; start += chunk) {
      const int64_t end = std::min(length, start + chunk);
      int64_t* counts = count[start / chunk];
      std::fill(counts, counts + KINDS, 0);
      const auto kind = [&](int64_t t) { return owner[t] < 0 ? BODY : owner[t] < dense ? TEXT : DENSE; };
      for (int64_t t = start; t < end; t++) counts[kind(t)]++;
      int64_t next[KINDS] = {start, start + counts[BODY], start + counts[BODY] + counts[TEXT]};
      for (int64_t t = start; t < end; t++) {
        const int64_t to = next[kind(t)]++;
        position[to] = t - start;
        slot[to] = owner[t] < 0 ? t : owner[t] < dense ? owner[t] : owner[t] - dense;
      }
    }
  }
};

}  // namespace
