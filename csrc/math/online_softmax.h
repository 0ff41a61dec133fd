// The normaliser of a softmax, built while the row streams by. Torch-free, host and device.
//
//   z = sum_j exp2(k (x_j - max))        k = log2(e) / temperature,  max = max_j x_j
//
// The maximum is not known before the end of the row, so z is kept relative to the largest logit so far:
// raising the maximum by d multiplies everything summed until then by exp2(-k d). Whole chunks raise it
// once, so that an element costs one exponential. Merging two states is raising both to the larger
// maximum and adding; the order does not matter, so threads may hold parts of a row.
// Source: Milakov, Gimelshein 2018, "Online normalizer calculation for softmax" (arXiv:1805.02867).
// State: 2 numbers a softmax; memory: none beyond reading the row once.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define KDFAST_HD __host__ __device__ __forceinline__
#else
#define KDFAST_HD inline
#endif
#if defined(__CUDA_ARCH__)
#define KDFAST_UNROLL _Pragma("unroll")
#else
#define KDFAST_UNROLL
#endif

namespace kdfast {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// 2^x. On the device the one instruction there is: relative error 2^-22, and 0 below 2^-126, where a
// probability adds nothing to an fp32 sum.
KDFAST_HD float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
KDFAST_HD double exp2_of(double x) { return ::exp2(x); }
KDFAST_HD float log2_of(float x) { return ::log2f(x); }
KDFAST_HD double log2_of(double x) { return ::log2(x); }

KDFAST_HD float log1p_of(float x) { return ::log1pf(x); }
KDFAST_HD double log1p_of(double x) { return ::log1p(x); }
KDFAST_HD float tanh_of(float x) { return ::tanhf(x); }
KDFAST_HD double tanh_of(double x) { return ::tanh(x); }

// 1 / x for x neither subnormal nor above 2^126: on the device one instruction, relative error 2^-23.
KDFAST_HD float reciprocal_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}
KDFAST_HD double reciprocal_of(double x) { return 1 / x; }

// A product rounded before it is used further: contracted into a multiply-add, the difference of two equal
// products would not be zero.
KDFAST_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
KDFAST_HD double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// The larger of the two; a NaN is passed over here, and found again in the sums.
KDFAST_HD float larger(float a, float b) { return ::fmaxf(a, b); }
KDFAST_HD double larger(double a, double b) { return ::fmax(a, b); }

// What logits are measured from: the maximum, or 0 while every class so far is masked (-inf).
template <class A>
KDFAST_HD A base_of(A max) {
  return max == -kInfinity<A> ? A(0) : max;
}

template <class A>
struct OnlineSoftmax {
  A max = -kInfinity<A>;
  A sum = 0;

  // What raising the maximum does to sums taken under the old one: e becomes e * factor, and the
  // distance k (x - max) becomes smaller by `distance`.
  struct Raise {
    A factor, distance;
  };

  KDFAST_HD Raise raise(A to, A k) {
    if (!(to > max)) return {A(1), A(0)};
    const A distance = k * (to - max);  // +inf if nothing but masked classes was seen
    const Raise change{exp2_of(-distance), max == -kInfinity<A> ? A(0) : distance};
    max = to;
    sum *= change.factor;
    return change;
  }
};

}  // namespace kdfast
