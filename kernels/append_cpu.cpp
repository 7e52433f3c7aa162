// Write a few tokens to a packed cache; append_cpu.py calls it. Results equal those of `write` in kernels/cache.py to
// the bit.
//
// Tokens are rotated already. A row is one token of one head. Head 0 also writes what all heads of a batch row share
// (classes, positions of text); otherwise rows are independent, so threads divide them.

#include <cmath>
#include <limits>

#include "numbers_cpu.h"

// Mirrored by append_cpu.py. Absent buffers are null and their sizes 0.
struct Append {
  const void* x;       // [B, H, tokens, D] in the cache's dtype
  const int64_t* at;   // [tokens]
  const uint8_t* kinds;  // null: all are text
  int32_t* state;
  void* codes;
  uint8_t* classes;
  uint16_t* range;
  void* ring;
  int32_t* pivot_at;
  uint16_t* text_codes;
  int32_t* text_at;
  int64_t dtype, batch, heads, tokens, head_dim, groups, capacity, bits, text_bits, low_width, window, pivot_count;
  int64_t text_capacity, kinds_batch, kinds_token, threads;
  double clip, text_clip;
};

namespace {

enum Status { DONE, BAD_POSITION };
enum State { END, RING, SHIFT };
constexpr uint8_t TEXT = 1;
constexpr int64_t PLAIN = 16, LARGEST_HEAD = 512;
constexpr int64_t ALONE = 1 << 15;  // up to so many numbers one thread is faster than several, which have to wake
constexpr float SCALE_FLOOR = 1e-5f, FP16_MAX = 65504.0f, INFINITE = std::numeric_limits<float>::infinity();

inline uint16_t saturated(float x) {  // inf and NaN stay
  return to_half(x > FP16_MAX && x < INFINITE ? FP16_MAX : x < -FP16_MAX && x > -INFINITE ? -FP16_MAX : x);
}

// quantizer.encode: x [D] -> codes [D], range [2 * groups].
void encode(const float* x, int64_t head_dim, int64_t groups, int64_t bits, float clip, uint8_t* code,
            uint16_t* range) {
  const int64_t size = head_dim / groups;
  const float top = (1 << bits) - 1;
  for (int64_t g = 0; g < groups; g++, x += size, code += size) {
    float low = x[0], high = x[0];
    for (int64_t j = 1; j < size; j++) {
      low = x[j] < low || x[j] != x[j] ? x[j] : low;
      high = x[j] > high || x[j] != x[j] ? x[j] : high;
    }
    low *= clip, high *= clip;
    float scale = high / top - low / top;
    scale = scale < SCALE_FLOOR ? SCALE_FLOOR : scale;
    range[g] = saturated(scale), range[groups + g] = saturated(low);
    scale = from_half(range[g]), low = from_half(range[groups + g]);
    for (int64_t j = 0; j < size; j++) {
      const float steps = std::rint((x[j] - low) / scale);
      code[j] = !(steps > 0) ? 0 : steps > top ? uint8_t(top) : uint8_t(steps);  // NaN is 0
    }
  }
}

// layout.pack_bits of the bits [from, from + kept) of each code, each `width` wide in its word.
void pack(const uint8_t* code, int64_t head_dim, int64_t from, int64_t kept, int64_t width, uint16_t* out) {
  const int64_t words = head_dim * width / 16;
  const unsigned mask = (1u << kept) - 1;
  for (int64_t w = 0; w < words; w++) out[w] = 0;
  for (int64_t s = 0; s < 16 / width; s++)
    for (int64_t w = 0; w < words; w++) out[w] |= uint16_t((code[s * words + w] >> from & mask) << width * s);
}

struct Writer {
  const Append& p;

  void write(int64_t row) const {
    const int64_t D = p.head_dim, token = row % p.tokens, lead = row / p.tokens, batch = lead / p.heads;
    const int64_t at = p.at[token], body = lead * p.capacity + at, slot = p.text_bits ? at + p.state[SHIFT] : 0;
    const uint8_t kind = p.kinds ? p.kinds[batch * p.kinds_batch + token * p.kinds_token] : TEXT;
    const bool first_head = lead % p.heads == 0, text = p.text_bits && kind == TEXT;
    float x[LARGEST_HEAD];
    load_row(p.x, p.dtype, row * D, D, x);
    if (p.window && token >= p.tokens - p.window)
      store_row(p.ring, p.dtype, (lead * p.window + at % p.window) * D, D, x);
    if (first_head && p.classes) p.classes[batch * p.capacity + at] = kind;
    if (first_head && p.text_bits) p.text_at[batch * p.text_capacity + slot] = text ? int32_t(at) : -1;
    if (p.bits == PLAIN) {
      store_row(p.codes, p.dtype, body * D, D, x);
      return;
    }
    uint8_t code[LARGEST_HEAD];
    const int64_t bits = text ? p.text_bits : p.bits, low = bits - p.bits;
    encode(x, D, p.groups, bits, float(text ? p.text_clip : p.clip), code, p.range + body * 2 * p.groups);
    pack(code, D, low, p.bits, p.bits, static_cast<uint16_t*>(p.codes) + body * (D * p.bits / 16));
    if (p.text_bits)
      pack(code, D, 0, low, p.low_width, p.text_codes + (lead * p.text_capacity + slot) * (D * p.low_width / 16));
  }
};

}  // namespace

extern "C" int akvq_append(const Append* call) {
  const Append& p = *call;
  for (int64_t t = 0; t < p.tokens; t++) {
    const int64_t at = p.at[t], slot = at + p.state[SHIFT];
    if (at < 0 || at >= p.capacity || (p.text_bits && (slot < 0 || slot >= p.text_capacity))) return BAD_POSITION;
  }
  const int64_t rows = p.batch * p.heads * p.tokens;
  const Writer writer{p};
#pragma omp parallel for num_threads(p.threads) if (rows * p.head_dim > ALONE)
  for (int64_t row = 0; row < rows; row++) writer.write(row);

  // Tokens are written from `start` on. After a crop that is before the old end: pivots from there on are overwritten,
  // and positions that the ring lost stay lost.
  const int64_t start = p.at[0], end = p.at[p.tokens - 1] + 1;
  for (int64_t i = 0; i < p.batch * p.pivot_count; i++)
    if (p.pivot_at[i] >= start) p.pivot_at[i] = -1;
  // where `start` lies past the end, the ring holds nothing of what is skipped
  const int64_t ring = p.state[RING], held = start > p.state[END] ? start : ring < start ? ring : start;
  p.state[RING] = int32_t(held > end - p.window ? held : end - p.window);
  p.state[END] = int32_t(end);
  return DONE;
}
