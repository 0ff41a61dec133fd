// Vectors of one width for every machine: 16 fp32 or 8 fp64 numbers, in the compiler's own vector types.
//
// GCC and Clang turn them into one AVX-512 register, two of AVX2, four of SSE2 or NEON, so that a kernel is written
// once; KDFAST_CLONES (vec.h) compiles it for each. What plain loops do not give is here: sums that stay in lanes
// until the row ends, ragged ends without a scalar loop, and 16-bit storage widened in registers.
#pragma once

#include <type_traits>
#include <utility>

#include "vec.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only to functions that are inlined
#endif

#define KDFAST_INLINED __attribute__((always_inline))  // of a lambda

namespace kdfast::cpu {

constexpr double kLn2 = 0.6931471805599453;

template <class A>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float V __attribute__((vector_size(64)));
  typedef float Unaligned __attribute__((vector_size(64), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(64)));
  static constexpr int64_t kCount = 16;
};
template <>
struct LanesOf<double> {
  typedef double V __attribute__((vector_size(64)));
  typedef double Unaligned __attribute__((vector_size(64), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(64)));
  static constexpr int64_t kCount = 8;
};
template <class A>
using Lanes = typename LanesOf<A>::V;
template <class A>
constexpr int64_t kCount = LanesOf<A>::kCount;

template <class A>
KDFAST_INLINE Lanes<A> broadcast(A x) {
  return Lanes<A>{} + x;
}

// Choices between lanes are loops over them, which become a comparison and a blend in every width. The comparison of two
// whole vectors GCC takes apart into branches where the machine's are narrower: under AVX2 kd_kl took four
// times as long. Running totals are changed in place, as a vector that is assigned there is copied by quarters.
template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(std::declval<V>()[0]);
template <class V>
KDFAST_INLINE V larger(V a, V b) {
  V r;
#pragma omp simd
  for (int i = 0; i < kLanesOf<V>; ++i) r[i] = a[i] > b[i] ? a[i] : b[i];
  return r;
}
template <class V>
KDFAST_INLINE void raise(V& max, V x) {
#pragma omp simd
  for (int i = 0; i < kLanesOf<V>; ++i) max[i] = x[i] > max[i] ? x[i] : max[i];
}
template <class V>
KDFAST_INLINE void add(V& total, V x) {
#pragma omp simd
  for (int i = 0; i < kLanesOf<V>; ++i) total[i] += x[i];
}
// 0 log 0 = 0: x counts only where its weight w is not zero.
template <class V>
KDFAST_INLINE V where_nonzero(V w, V x) {
  V r;
#pragma omp simd
  for (int i = 0; i < kLanesOf<V>; ++i) r[i] = w[i] != 0 ? x[i] : 0;
  return r;
}
template <class V>
KDFAST_INLINE void add_where_nonzero(V& total, V w, V x) {
#pragma omp simd
  for (int i = 0; i < kLanesOf<V>; ++i) total[i] = w[i] != 0 ? total[i] + x[i] : total[i];
}

// Sixteen stored numbers as lanes, and back.
KDFAST_INLINE Lanes<float> load_lanes(const float* x) { return *reinterpret_cast<const LanesOf<float>::Unaligned*>(x); }
KDFAST_INLINE Lanes<double> load_lanes(const double* x) { return *reinterpret_cast<const LanesOf<double>::Unaligned*>(x); }
template <class A>
KDFAST_INLINE void store_lanes(A* to, Lanes<A> x) {
#pragma omp simd
  for (int i = 0; i < kCount<A>; ++i) to[i] = x[i];
}

typedef uint16_t Half16 __attribute__((vector_size(32)));
typedef uint32_t Word16 __attribute__((vector_size(64)));
KDFAST_INLINE Lanes<float> load_lanes(const BFloat16Bits* x) {
  Half16 bits;
  std::memcpy(&bits, x, sizeof(bits));
  return (Lanes<float>)(__builtin_convertvector(bits, Word16) << 16);
}
KDFAST_INLINE void store_lanes(BFloat16Bits* to, Lanes<float> x) {
  const Word16 bits = (Word16)x;
  const Word16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to the nearest, ties to even
  Half16 narrow;
#pragma omp simd
  for (int i = 0; i < 16; ++i) narrow[i] = static_cast<uint16_t>(x[i] == x[i] ? rounded[i] : 0x7fc0u);
  std::memcpy(to, &narrow, sizeof(narrow));
}
// Asks for the row's memory 8 KiB ahead of its use. The machine's own prefetching stops at every page of 4 KiB:
// 4096 x 1000 took 40 % longer without.
template <class T>
KDFAST_INLINE void prefetch(const T* x) {
  __builtin_prefetch(reinterpret_cast<const char*>(x) + 8192, 0, 2);
}

// Stores that do not first read what they overwrite, for outputs too large to stay in a cache. `to` must be aligned to 16
// bytes; stream_end() makes them visible to other threads.
template <class T, class V>
KDFAST_INLINE void stream_lanes(T* to, V x) {
#if defined(__SSE2__)
  alignas(64) T narrow[kCount<std::conditional_t<std::is_same_v<T, double>, double, float>>];
  store_lanes(narrow, x);
  __m128i part[sizeof(narrow) / 16];
  std::memcpy(part, narrow, sizeof(narrow));
  for (size_t i = 0; i < sizeof(narrow) / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, part[i]);
#else
  store_lanes(to, x);
#endif
}
inline void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The end of a row: `count` columns, less than a vector. Where more memory of the same tensor follows (`more`), a whole
// vector is read and the rest of it put out; collecting the columns one by one costs 20 ns, a row of 10 classes.
struct Tail {
  int64_t count;
  bool more;
};
using Whole = std::true_type;

template <class A>
KDFAST_INLINE Lanes<A> first_lanes(Lanes<A> x, int64_t count, A otherwise) {
  using I = typename LanesOf<A>::Bits;
  using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  I index;
  for (int i = 0; i < kCount<A>; ++i) index[i] = i;
  const I inside = (index - static_cast<Int>(count)) >> (8 * sizeof(A) - 1);  // all ones or zero; a comparison crashes GCC 12 here
  return (Lanes<A>)((inside & (I)x) | (~inside & (I)broadcast(otherwise)));
}
template <class T, class A>
KDFAST_INLINE Lanes<A> load(const T* x, Whole, A) {
  return load_lanes(x);
}
template <class T, class A>
KDFAST_INLINE Lanes<A> load(const T* x, Tail tail, A otherwise) {
  if (tail.more) return first_lanes(load_lanes(x), tail.count, otherwise);
  T some[kCount<A>] = {};
  for (int64_t i = 0; i < tail.count; ++i) some[i] = x[i];
  return first_lanes(load_lanes(some), tail.count, otherwise);
}
template <class T, class V>
KDFAST_INLINE void store(T* to, V x, Whole) {
  store_lanes(to, x);
}
template <class T, class V>
KDFAST_INLINE void store(T* to, V x, Tail tail) {
  T some[sizeof(V) / sizeof(x[0])];
  store_lanes(some, x);
  const T* from = some;  // by powers of two: a library call costs more than the row's arithmetic
  if (tail.count & 8) std::memcpy(to, from, 8 * sizeof(T)), to += 8, from += 8;
  if (tail.count & 4) std::memcpy(to, from, 4 * sizeof(T)), to += 4, from += 4;
  if (tail.count & 2) std::memcpy(to, from, 2 * sizeof(T)), to += 2, from += 2;
  if (tail.count & 1) *to = *from;
}

// f(j, Whole) for every whole vector of a row, then f(j, Tail) for what is left.
template <class A, class F>
KDFAST_INLINE void over_lanes(int64_t begin, int64_t end, bool more, const F& f) {
  int64_t j = begin;
  for (; j + kCount<A> <= end; j += kCount<A>) f(j, Whole{});
  if (j < end) f(j, Tail{end - j, more});
}

// Sum and maximum over the lanes, by halves: log2 steps, each in the narrower register. Sums in fp64: rounding the four
// last additions to fp32 would be as large as all the others together.
template <int N, class A>
struct Vector {
  typedef A V __attribute__((vector_size(N * sizeof(A))));
};
template <int N, class V, class Op>
KDFAST_INLINE auto folded(V x, const Op& op) {
  using A = std::decay_t<decltype(x[0])>;
  typename Vector<N / 2, A>::V half[2];
  std::memcpy(half, &x, sizeof(half));
  if constexpr (N == 2) return op(half[0], half[1])[0];
  else return folded<N / 2>(op(half[0], half[1]), op);
}
template <class A>
KDFAST_INLINE double sum_of(Lanes<A> x) {
  using Wide = typename Vector<kCount<A>, double>::V;
  const Wide wide = __builtin_convertvector(x, Wide);
  return folded<kCount<A>>(wide, [](auto a, auto b) KDFAST_INLINED { return a + b; });
}
template <class A>
KDFAST_INLINE A max_of(Lanes<A> x) {
  return folded<kCount<A>>(x, [](auto a, auto b) KDFAST_INLINED { return a > b ? a : b; });
}

// A sum over a row: in lanes for some thousand columns, then in fp64.
template <class A>
struct Total {
  double before = 0;
  Lanes<A> lanes{};

  inline __attribute__((always_inline)) void flush() { before += sum_of<A>(lanes), lanes = Lanes<A>{}; }
};

// 2^y; exactly 0 from y = -127 on down, NaN for NaN; y < 127. y is split into an integer n (rounded by the magic constant)
// and f in [-1/2, 1/2]; 2^f is a minimax polynomial of degree 5 through 1 (relative error 1.6e-7 at most, 7e-8 in the
// mean square, its rounding included), 2^n an addition to the exponent. At -127 both cancel to the bits of 0.
KDFAST_INLINE Lanes<float> exp2_lanes(Lanes<float> y) {
  using I = LanesOf<float>::Bits;
  y = larger(broadcast(-127.0f), y);
  const Lanes<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23
  const Lanes<float> shifted = y + magic;
  const Lanes<float> f = y - (shifted - magic);
  Lanes<float> p = broadcast(1.32646528e-3f);
  p = p * f + 9.67151113e-3f;
  p = p * f + 5.55073395e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  return (Lanes<float>)((I)p + ((I)shifted << 23));
}
KDFAST_INLINE Lanes<double> exp2_lanes(Lanes<double> y) {
  double x[8];
  store_lanes(x, y);
  for (int i = 0; i < 8; ++i) x[i] = std::exp2(x[i]);
  return load_lanes(x);
}

}  // namespace kdfast::cpu
