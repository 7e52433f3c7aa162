// Write a few tokens to a packed cache; append_cpu.py calls it. Results equal those of `write` in kernels/cache.py to
// the bit, but for sums over channels and tokens, which symmetric layouts and means of blocks take in another order.
//
// Tokens are rotated already. A row is one token of one head. Head 0 also writes what all heads of a batch row share
// (classes, positions of text); otherwise rows are independent, so threads divide them.

#include <algorithm>
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
  void* means;  // null: codes hold the tokens themselves
  void* ring;
  int32_t* pivot_at;
  uint16_t* text_codes;
  int32_t* text_at;
  int64_t dtype, batch, heads, tokens, head_dim, groups, capacity, bits, text_bits, low_width, window, pivot_count;
  int64_t text_capacity, symmetric, uneven, block, enough, kinds_batch, kinds_token, threads;
  double clip, text_clip, step_2, step_4;
};

namespace {

enum Status { DONE, BAD_POSITION };
enum State { END, RING, SHIFT };
constexpr uint8_t TEXT = 1, PADDING = 3;
constexpr int64_t PLAIN = 16, LARGEST_HEAD = 512;
constexpr int64_t ALONE = 1 << 15;  // up to so many numbers one thread is faster than several, which have to wake
constexpr float SCALE_FLOOR = 1e-5f, FP16_MAX = 65504.0f, BF16_MAX = 0x1.FEp127f;
constexpr float FP32_MAX = std::numeric_limits<float>::max(), INFINITE = std::numeric_limits<float>::infinity();

inline uint16_t saturated(float x) {  // inf and NaN stay
  return to_half(x > FP16_MAX && x < INFINITE ? FP16_MAX : x < -FP16_MAX && x > -INFINITE ? -FP16_MAX : x);
}

// NaN is 0.
inline uint8_t to_code(float steps, float top) { return !(steps > 0) ? 0 : uint8_t(steps > top ? top : steps); }

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
    for (int64_t j = 0; j < size; j++) code[j] = to_code(std::rint((x[j] - low) / scale), top);
  }
}

// The sum of f(0) to f(count - 1), in lanes that a compiler can put into vectors.
template <class F>
float sum_of(int64_t count, F f) {
  constexpr int64_t LANES = 8;
  float lane[LANES] = {}, sum = 0;
  const int64_t whole = count / LANES * LANES;
  for (int64_t j = 0; j < whole; j += LANES)
    for (int64_t i = 0; i < LANES; i++) lane[i] += f(j + i);
  for (int64_t j = whole; j < count; j++) lane[j - whole] += f(j);
  for (float x : lane) sum += x;
  return sum;
}

// quantizer.encode_symmetric of one group: x [size] -> codes [size]; returns the scale. best: STEPS of these bits.
uint16_t encode_symmetric(const float* x, int64_t size, int64_t bits, float best, uint8_t* code) {
  const float top = (1 << bits) - 1, middle = top / 2;
  const float length = sum_of(size, [&](int64_t j) { return x[j] * x[j]; });
  float step = best * std::sqrt(length / size);
  step = step == 0 ? 1.0f : step;
  for (int64_t j = 0; j < size; j++) code[j] = to_code(std::rint(x[j] / step + middle), top);
  const float along = sum_of(size, [&](int64_t j) { return x[j] * (code[j] - middle); });
  return saturated(length == 0 ? 0.0f : length / along);
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

  uint8_t kind_of(int64_t batch, int64_t token) const {
    return p.kinds ? p.kinds[batch * p.kinds_batch + token * p.kinds_token] : TEXT;
  }

  // Of a head: where the mean of a block starts.
  int64_t mean_at(int64_t lead, int64_t block) const {
    return (lead * ((p.capacity + p.block - 1) / p.block) + block) * p.head_dim;
  }

  // Codes [D] and range of a token x that is no text with more bits.
  void encode_body(const float* x, uint8_t* code, uint16_t* range) const {
    const int64_t D = p.head_dim, first = D / 4, size = D / p.groups;
    if (p.uneven) {  // uneven.encode: high and low codes of the first part, then codes of the middle
      uint8_t fine[LARGEST_HEAD / 4];
      range[0] = encode_symmetric(x, first, 4, p.step_4, fine);
      range[1] = encode_symmetric(x + first, 2 * first, 2, p.step_2, code + 2 * first);
      for (int64_t j = 0; j < first; j++) code[j] = fine[j] >> 2, code[first + j] = fine[j] & 3;
    } else if (p.symmetric) {
      for (int64_t g = 0; g < p.groups; g++)
        range[g] = encode_symmetric(x + g * size, size, p.bits, p.bits == 2 ? p.step_2 : p.step_4, code + g * size);
    } else {
      encode(x, D, p.groups, p.bits, p.clip, code, range);
    }
  }

  // blocks.begin_blocks of a head, for the block that begins at a token: its mean is that of the newest tokens, which
  // are these, fewer than a block holds, and what the ring has of those before them. So call it before the tokens are
  // written.
  void begin_block(int64_t lead, int64_t block) const {
    const int64_t D = p.head_dim, batch = lead / p.heads, start = p.at[0], end = p.at[p.tokens - 1] + 1;
    const int64_t written = p.state[END];
    const int64_t held = std::max<int64_t>({p.state[RING], written - p.window, end - p.block, 0});
    float mean[LARGEST_HEAD] = {}, x[LARGEST_HEAD];
    int64_t count = 0;
    const auto add = [&](const void* from, int64_t row) {
      load_row(from, p.dtype, row * D, D, x), count++;
      for (int64_t j = 0; j < D; j++) mean[j] += std::fabs(x[j]) < INFINITE ? x[j] : 0.0f;
    };
    for (int64_t at = held; p.window && at < std::min(start, written); at++)
      if (p.classes[batch * p.capacity + at] != PADDING) add(p.ring, lead * p.window + at % p.window);
    for (int64_t token = 0; token < p.tokens; token++)
      if (kind_of(batch, token) != PADDING) add(p.x, lead * p.tokens + token);
    const float most = p.dtype == F32 ? FP32_MAX : p.dtype == BF16 ? BF16_MAX : FP16_MAX;
    for (int64_t j = 0; j < D; j++) mean[j] = std::min(std::max(mean[j] / count, -most), most);
    if (count < p.enough) {
      if (block) load_row(p.means, p.dtype, mean_at(lead, block - 1), D, mean);
      else std::fill(mean, mean + D, 0.0f);
    }
    store_row(p.means, p.dtype, mean_at(lead, block), D, mean);
  }

  void write(int64_t row) const {
    const int64_t D = p.head_dim, token = row % p.tokens, lead = row / p.tokens, batch = lead / p.heads;
    const int64_t at = p.at[token], body = lead * p.capacity + at, slot = p.text_bits ? at + p.state[SHIFT] : 0;
    const uint8_t kind = kind_of(batch, token);
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
    if (p.means) {
      float mean[LARGEST_HEAD];
      load_row(p.means, p.dtype, mean_at(lead, at / p.block), D, mean);
      for (int64_t j = 0; j < D; j++) x[j] -= mean[j];
    }
    uint8_t code[LARGEST_HEAD];
    uint16_t* range = p.range + body * (p.symmetric ? p.groups : 2 * p.groups);
    const int64_t bits = text ? p.text_bits : p.bits, low = bits - p.bits;
    if (text) encode(x, D, p.groups, bits, p.text_clip, code, range);
    else encode_body(x, code, range);
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
  const int64_t rows = p.batch * p.heads * p.tokens, start = p.at[0], end = p.at[p.tokens - 1] + 1;
  const Writer writer{p};
  if (const int64_t block = p.means ? (start + p.block - 1) / p.block : 0; p.means && block * p.block < end)
#pragma omp parallel for num_threads(p.threads) if (p.batch * p.heads * p.block * p.head_dim > ALONE)
    for (int64_t lead = 0; lead < p.batch * p.heads; lead++) writer.begin_block(lead, block);
#pragma omp parallel for num_threads(p.threads) if (rows * p.head_dim > ALONE)
  for (int64_t row = 0; row < rows; row++) writer.write(row);

  // Tokens are written from `start` on. After a crop that is before the old end: pivots from there on are overwritten,
  // and positions that the ring lost stay lost.
  for (int64_t i = 0; i < p.batch * p.pivot_count; i++)
    if (p.pivot_at[i] >= start) p.pivot_at[i] = -1;
  // where `start` lies past the end, the ring holds nothing of what is skipped
  const int64_t ring = p.state[RING], held = start > p.state[END] ? start : ring < start ? ring : start;
  p.state[RING] = int32_t(held > end - p.window ? held : end - p.window);
  p.state[END] = int32_t(end);
  return DONE;
}
