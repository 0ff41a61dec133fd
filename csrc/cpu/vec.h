// Small pieces every CPU kernel is made of: loops the compiler turns into vectors, written once for
// AVX-512, AVX2 and whatever the machine has.
//
// A row function is compiled three times (KDFAST_CLONES) and the loader picks; everything it calls is
// forced inline so that it is compiled along. Arithmetic is fp32 (fp64 for fp64 storage).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../math/half.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(KDFAST_NO_CLONES)
#define KDFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KDFAST_CLONES
#endif
#define KDFAST_INLINE static inline __attribute__((always_inline))

namespace kdfast::cpu {

constexpr int64_t kLanes = 16;       // rows are padded to whole vectors of the widest kind
constexpr int64_t kBlock = 1024;     // columns summed in fp32 before they join the fp64 total
constexpr double kLog2e = 1.4426950408889634;

// e^(x scale) for x <= 0, as 2^(x k) with k = scale log2(e); 0 where that is below 2^-126, NaN for NaN.
// x k is split into an integer n (rounded by the magic constant) and f in [-1/2, 1/2]; 2^f is a minimax polynomial
// of degree 6 (relative error 1.5e-8), 2^n an addition to the exponent. k comes in two parts: rounding it to fp32
// would change the temperature by 3e-8, the same way in every term of a sum.
template <class A>
struct ExpScale {
  A k;
  explicit ExpScale(double scale) : k(static_cast<A>(scale * kLog2e)) {}
};
template <>
struct ExpScale<float> {
  float k, rest;
  explicit ExpScale(double scale)
      : k(static_cast<float>(scale * kLog2e)), rest(static_cast<float>(scale * kLog2e - static_cast<double>(k))) {}
};

KDFAST_INLINE float exp_nonpositive(float x, const ExpScale<float>& scale) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  const float y = x * scale.k;
  const float shifted = (y < -126.0f ? -126.0f : y) + magic;
  const float f = (x * scale.k - (shifted - magic)) + x * scale.rest;  // the first product fused, so exact
  float p = 1.5345754e-4f;
  p = p * f + 1.3399997e-3f;
  p = p * f + 9.6184900e-3f;
  p = p * f + 5.5503286e-2f;
  p = p * f + 2.4022646e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  uint32_t exponent, bits;
  std::memcpy(&exponent, &shifted, 4);
  std::memcpy(&bits, &p, 4);
  bits += exponent << 23;
  float result;
  std::memcpy(&result, &bits, 4);
  return y < -126.0f ? 0.0f : result;
}
KDFAST_INLINE double exp_nonpositive(double x, const ExpScale<double>& scale) { return std::exp2(x * scale.k); }

template <class A>
KDFAST_INLINE A row_max(const A* x, int64_t n) {
  A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; ++j) m = x[j] > m ? x[j] : m;
  return m;
}

// Storage to arithmetic type, and back.
KDFAST_INLINE float widen(float x) { return x; }
KDFAST_INLINE double widen(double x) { return x; }
KDFAST_INLINE float widen(BFloat16Bits x) { return bfloat16_to_float(x.bits); }
KDFAST_INLINE float widen(HalfBits x) { return half_to_float(x.bits); }
KDFAST_INLINE void narrow(float x, float* out) { *out = x; }
KDFAST_INLINE void narrow(double x, double* out) { *out = x; }
KDFAST_INLINE void narrow(float x, BFloat16Bits* out) { out->bits = float_to_bfloat16(x); }
KDFAST_INLINE void narrow(float x, HalfBits* out) { out->bits = float_to_half(x); }

// Copies a row into `to`, padded with -inf (a class of probability zero) up to `padded`.
template <class T, class A>
KDFAST_INLINE void load_row(const T* from, A* to, int64_t n, int64_t padded) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = widen(from[j]);
  for (int64_t j = n; j < padded; ++j) to[j] = -std::numeric_limits<A>::infinity();
}

template <class T, class A>
KDFAST_INLINE void store_row(const A* from, T* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(from[j], &to[j]);
}

}  // namespace kdfast::cpu
