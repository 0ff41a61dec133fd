// bfloat16 and IEEE half, to fp32 and back, by integer arithmetic without branches, so that loops over
// them become vector code on any machine. Rounding is to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace kdfast {

struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

inline __attribute__((always_inline)) float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline __attribute__((always_inline)) uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline __attribute__((always_inline)) float bfloat16_to_float(uint16_t h) {
  return bits_to_float(static_cast<uint32_t>(h) << 16);
}

inline __attribute__((always_inline)) uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>((x != x ? 0x7fc00000u : rounded) >> 16);
}

// The half's exponent and mantissa moved in place are its value times 2^-112, subnormals included.
inline __attribute__((always_inline)) float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // inf or NaN
  const uint32_t bits = magnitude >= 0x7c00u ? special : float_to_bits(scaled);
  return bits_to_float(bits | (static_cast<uint32_t>(h & 0x8000u) << 16));
}

// Below 2^-14 adding 1/2 lets the fp32 adder round to the half's subnormal grid; above, round the
// mantissa as an integer. 65520 and more is infinity.
inline __attribute__((always_inline)) uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(h | ((bits >> 16) & 0x8000u));
}

}  // namespace kdfast
