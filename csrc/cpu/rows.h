// How CPU kernels get at the rows of their tensors: values a row, storage types, rows over threads.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "../stable.h"
#include "vec.h"

namespace kdfast::cpu {

// One value for all rows, or one a row, or a constant where there is no tensor.
template <class A>
struct ValueOfRow {
  const A* values;
  int64_t stride;
  double otherwise;
  ValueOfRow(const OptionalTensor& x, double otherwise)
      : values(data_or_null<A>(x)), stride(x.has_value() && x->numel() > 1), otherwise(otherwise) {}
  double operator[](int64_t row) const { return values == nullptr ? otherwise : values[row * stride]; }
};

// A column [rows] of results that may not be wanted: empty then.
template <class A>
A* column_or_null(const Tensor& x) {
  return x.numel() == 0 ? nullptr : static_cast<A*>(x.data_ptr());
}

// Whether a row may be worked on where it lies: a ragged last vector costs less than a copy from 256 columns on.
template <class T, class A>
bool in_place(int64_t n) {
  return std::is_same_v<T, A> && (n % kLanes == 0 || n >= 256);
}
inline int64_t padded_to_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A row into padded memory of the arithmetic type, and back. Each file has its own, as clones cannot be shared.
#define KDFAST_CONVERT(T, A)                                                                              \
  [[maybe_unused]] KDFAST_CLONES static void load(const T* from, A* to, int64_t n, int64_t padded) {       \
    load_row(from, to, n, padded);                                                                         \
  }                                                                                                        \
  [[maybe_unused]] KDFAST_CLONES static void store(const A* from, T* to, int64_t n) { store_row(from, to, n); }
KDFAST_CONVERT(float, float)
KDFAST_CONVERT(double, double)
KDFAST_CONVERT(BFloat16Bits, float)
KDFAST_CONVERT(HalfBits, float)
#undef KDFAST_CONVERT

// f(T{}, A{}): the storage type of the logits, and that of the arithmetic.
template <class F>
void with_types(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(BFloat16Bits{}, float{});
    case ScalarType::Half: return f(HalfBits{}, float{});
    default: STD_TORCH_CHECK(false, "kdfast: logits must be fp64, fp32, bf16 or fp16");
  }
}

// f(begin, end) over threads, at least 32k elements each: below that waking a thread costs more than it saves.
template <class F>
void over_rows(int64_t rows, int64_t columns, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  rows <= grain ? f(int64_t{0}, rows) : torch::stable::parallel_for(0, rows, grain, f);
}

// out[at] = coefficient * sum of the losses [rows], in a fixed order, whatever the number of threads.
inline void write_scaled_sum(const Tensor& losses, double coefficient, const Tensor& out, int64_t at) {
  const auto sum = [&]<class A>(const A* values, A* to) {
    to[at] = static_cast<A>(coefficient * std::accumulate(values, values + losses.numel(), 0.0));
  };
  if (losses.scalar_type() == ScalarType::Double) {
    sum(static_cast<const double*>(losses.data_ptr()), static_cast<double*>(out.data_ptr()));
  } else {
    sum(static_cast<const float*>(losses.data_ptr()), static_cast<float*>(out.data_ptr()));
  }
}
inline Tensor scaled_sum(const Tensor& losses, double coefficient) {
  Tensor result = empty(losses, {}, losses.scalar_type());
  write_scaled_sum(losses, coefficient, result, 0);
  return result;
}

}  // namespace kdfast::cpu
