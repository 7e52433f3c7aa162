// Numbers of the three dtypes of a cache, as attend_cpu.cpp and append_cpu.cpp read and write them.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

enum Dtype { F32, BF16, F16, BOOL };

inline float bits_to_float(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint32_t float_to_bits(float x) {
  uint32_t out;
  std::memcpy(&out, &x, 4);
  return out;
}

inline float from_half(uint32_t half) {  // no subnormal float on the way: torch may have switched those off
  const uint32_t magnitude = (half & 0x7fff) << 13, exponent = half & 0x7c00, sign = (half & 0x8000) << 16;
  const float normal = bits_to_float(magnitude + (exponent == 0x7c00 ? 0x70000000u : 0x38000000u));
  const float tiny = bits_to_float(magnitude + 0x38800000u) - 6.103515625e-05f;
  return bits_to_float(float_to_bits(exponent ? normal : tiny) | sign);
}

inline uint16_t to_half(float x) {  // round to nearest even
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000)  // adding 0.5 rounds at the last place of a subnormal half
    return sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
  return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

inline uint16_t to_bfloat(float x) {
  const uint32_t bits = float_to_bits(x);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float element(const void* base, int64_t dtype, int64_t at) {
  if (dtype == F32) return static_cast<const float*>(base)[at];
  const uint32_t half = static_cast<const uint16_t*>(base)[at];
  return dtype == BF16 ? bits_to_float(half << 16) : from_half(half);
}

void load_row(const void* base, int64_t dtype, int64_t at, int64_t count, float* out) {
  if (dtype == F32) std::memcpy(out, static_cast<const float*>(base) + at, 4 * count);
  else
    for (int64_t i = 0; i < count; i++) out[i] = element(base, dtype, at + i);
}

void store_row(void* base, int64_t dtype, int64_t at, int64_t count, const float* row) {
  if (dtype == F32) std::memcpy(static_cast<float*>(base) + at, row, 4 * count);
  else
    for (int64_t i = 0; i < count; i++)
      static_cast<uint16_t*>(base)[at + i] = dtype == BF16 ? to_bfloat(row[i]) : to_half(row[i]);
}

}  // namespace
