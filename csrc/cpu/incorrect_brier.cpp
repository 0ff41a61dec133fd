// incorrect_brier on the CPU: the row's loss, statistics and gradient with the row resident in cache.
//
//   p = softmax(z),  a = p - y,   loss = sum a^2  where argmax z != argmax y, else 0
//   dz = 2 p (a - <p, a>)         where wrong, else 0
//
// Fused: softmax, prediction, squared error and gradient. A row that is right costs one sweep, for its maximum, and no
// exponential. A wrong one is swept again from cache: exponentials with their sum and sum of squares, which is all that
// labels need; the squared error, for given probabilities, whose difference must be taken before the square; the
// gradient. Memory: read z, write dz: 8 bytes an element in fp32, 4 in bf16 (and y, where it is given).
// Source: Liu et al. 2022 (arXiv:2202.07940), eq. 8; docs/math/incorrect_brier.md.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../stable.h"
#include "gradients.h"
#include "rows.h"
#include "vec.h"

namespace kdfast::cpu {
namespace {

// The layout stands in kdfast/reference/incorrect_brier.py.
enum Statistic { kMax, kSum, kInner, kWrong, kBrierStats };

// One row, widened to the arithmetic type and in cache.
template <class A>
struct BrierRow {
  const A *logits, *target;  // [n]; target may be null
  A* e;                      // [n]: scratch, and the gradient where that is asked for
  int64_t n;                 // columns, the padding included
  int64_t label;             // where there is no target
};

template <class A>
KDFAST_INLINE bool any_nan(const A* x, int64_t n) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t j = 0; j < n; ++j) found |= x[j] != x[j];
  return found != 0;
}

// Whether x[j] is the first of the largest, given which value that is.
template <class A>
KDFAST_INLINE bool is_first(const A* x, int64_t j, A largest) {
  if (x[j] != largest) return false;
  int earlier = 0;
#pragma omp simd reduction(| : earlier)
  for (int64_t i = 0; i < j; ++i) earlier |= x[i] == largest;
  return earlier == 0;
}

// 1 for a wrong row, 0 for a right one, NaN for one without a prediction.
template <class A>
KDFAST_INLINE A is_wrong(const BrierRow<A>& row, A max) {
  if (!(std::abs(max) < std::numeric_limits<A>::infinity()) || any_nan(row.logits, row.n)) {
    return std::numeric_limits<A>::quiet_NaN();
  }
  int64_t label = row.label;
  if (row.target != nullptr) {
    if (any_nan(row.target, row.n)) return std::numeric_limits<A>::quiet_NaN();
    label = std::find(row.target, row.target + row.n, row_max(row.target, row.n)) - row.target;
  }
  return is_first(row.logits, label, max) ? A(0) : A(1);
}

// Columns whose sum is taken in the arithmetic type before it goes on in double: with kBlock of them a lane of a short
// vector adds up so many that fp32 loses a digit.
constexpr int64_t kSummed = 256;

// e = exp(z - max), their sum and the sum of their squares. The largest, each 1, are counted apart: beside a 1 the small
// ones would be rounded to its last digit, and p and <p, a> nearly cancel where one class has most.
struct Exponentials {
  double sum = 0, squares = 0;
};
template <class A>
KDFAST_INLINE Exponentials exponentials(const BrierRow<A>& row, A max) {
  Exponentials total;
  const ExpScale<A> one(1.0);
  for (int64_t begin = 0; begin < row.n; begin += kSummed) {
    const int64_t end = begin + kSummed < row.n ? begin + kSummed : row.n;
    A sum = 0, squares = 0, largest = 0;
#pragma omp simd reduction(+ : sum, squares, largest)
    for (int64_t j = begin; j < end; ++j) {
      const A x = row.logits[j] - max, e = exp_nonpositive(x, one), small = x < A(0) ? e : A(0);
      row.e[j] = e;
      sum += small;
      squares += small * small;
      largest += x < A(0) ? A(0) : A(1);
    }
    total.sum += sum, total.squares += squares;
    total.sum += largest, total.squares += largest;
  }
  return total;
}

template <class A>
KDFAST_INLINE void statistics(const BrierRow<A>& row, A* loss, A* stats) {
  const A max = row_max(row.logits, row.n), wrong = is_wrong(row, max);
  stats[kMax] = max, stats[kSum] = stats[kInner] = 0, stats[kWrong] = *loss = wrong;
  if (wrong != A(1)) return;
  const Exponentials sums = exponentials(row, max);
  const double inverse = 1 / sums.sum;
  double value = 0, inner = 0;
  if (row.target == nullptr) {  // wrong: p at the label is at most 1/2, so nothing cancels here
    const double p = row.e[row.label] * inverse, squares = sums.squares * inverse * inverse;
    value = squares - 2 * p + 1;
    inner = squares - p;
  } else {
    const A* const e = row.e;
    const A* const y = row.target;
    const A scale = static_cast<A>(inverse);
    for (int64_t begin = 0; begin < row.n; begin += kSummed) {
      const int64_t end = begin + kSummed < row.n ? begin + kSummed : row.n;
      A squares = 0, dot = 0;
#pragma omp simd reduction(+ : squares, dot)
      for (int64_t j = begin; j < end; ++j) {
        const A p = e[j] * scale, a = p - y[j];
        squares += a * a;
        dot += p * a;
      }
      value += squares, inner += dot;
    }
  }
  *loss = static_cast<A>(value);
  stats[kSum] = static_cast<A>(sums.sum), stats[kInner] = static_cast<A>(inner);
}

// e becomes coefficient * dz; `ready` where it holds the exponentials.
template <class A>
KDFAST_INLINE void gradient(const BrierRow<A>& row, const A* stats, A coefficient, bool ready) {
  if (stats[kWrong] != A(1)) {
    std::fill_n(row.e, row.n, stats[kWrong]);  // 0 or NaN
    return;
  }
  if (!ready) exponentials(row, stats[kMax]);
  const A scale = A(1) / stats[kSum], factor = 2 * coefficient * scale, inner = stats[kInner];
  if (row.target == nullptr) {
    const A at_label = factor * row.e[row.label];
#pragma omp simd
    for (int64_t j = 0; j < row.n; ++j) row.e[j] = factor * row.e[j] * (row.e[j] * scale - inner);
    row.e[row.label] -= at_label;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < row.n; ++j) row.e[j] = factor * row.e[j] * ((row.e[j] * scale - row.target[j]) - inner);
  }
}

// What is compiled once for each kind of vector unit.
KDFAST_CLONES void row_statistics(const BrierRow<float>& row, float* loss, float* stats) { statistics(row, loss, stats); }
void row_statistics(const BrierRow<double>& row, double* loss, double* stats) { statistics(row, loss, stats); }
KDFAST_CLONES void row_gradient(const BrierRow<float>& row, const float* stats, float coefficient, bool ready) {
  gradient(row, stats, coefficient, ready);
}
void row_gradient(const BrierRow<double>& row, const double* stats, double coefficient, bool ready) {
  gradient(row, stats, coefficient, ready);
}

struct Inputs {
  Tensor logits;                  // [rows, classes]
  OptionalTensor labels, target;  // [rows], [rows, classes]
  int64_t ignore_index;
};

struct Outputs {
  Tensor *loss = nullptr, *gradient = nullptr;  // [rows], [rows, classes]: each may be absent
  const Tensor* stats = nullptr;                // [rows, 4]: read where there is no loss, written (or absent) where there is
  const Tensor* grad = nullptr;                 // [rows] factors of the gradients; absent: coefficient for every row
  double coefficient = 1.0;
};

template <class T>
T* data_of(const Tensor* x) {
  return x == nullptr ? nullptr : static_cast<T*>(x->data_ptr());
}

// T is the storage type of the logits, A the type of the arithmetic and of every other floating point tensor.
template <class T, class A>
void rows(const Inputs& in, const Outputs& out, int64_t begin, int64_t end) {
  const int64_t n = in.logits.size(1), padded = padded_to_lanes(n);
  const bool direct = in_place<T, A>(n);
  static thread_local std::vector<A> memory;  // kept between calls, so that no call faults pages in
  if (static_cast<int64_t>(memory.size()) < 3 * padded) memory.resize(3 * padded);
  A *const e = memory.data(), *const z = e + padded, *const y = e + 2 * padded;

  const T* logits = static_cast<const T*>(in.logits.data_ptr());
  const int64_t* labels = data_or_null<int64_t>(in.labels);
  const A *target = data_or_null<A>(in.target), *grad = data_of<const A>(out.grad);
  A *const loss = data_of<A>(out.loss), *const kept = data_of<A>(out.stats);
  T* const gradient = data_of<T>(out.gradient);

  for (int64_t i = begin; i < end; ++i) {
    T* const dz = gradient == nullptr ? nullptr : gradient + i * n;
    const A coefficient = grad != nullptr ? grad[i] : static_cast<A>(out.coefficient);
    A own_stats[kBrierStats];
    A* const stats = kept == nullptr ? own_stats : kept + i * kBrierStats;
    A own_loss;
    A* const value = loss == nullptr ? &own_loss : loss + i;
    const bool ignored = labels != nullptr && labels[i] == in.ignore_index;
    const bool outside = labels != nullptr && (labels[i] < 0 || labels[i] >= n);
    if (ignored || outside) {
      const A instead = ignored ? A(0) : std::numeric_limits<A>::quiet_NaN();
      if (loss != nullptr) *value = instead, std::fill_n(stats, kBrierStats, instead);
      T narrow_instead;
      narrow(instead, &narrow_instead);
      if (dz != nullptr) std::fill_n(dz, n, narrow_instead);
      continue;
    }
    BrierRow<A> row{z, target == nullptr ? nullptr : target + i * n, e, direct ? n : padded, labels != nullptr ? labels[i] : -1};
    if constexpr (std::is_same_v<T, A>) {
      if (direct) row.logits = logits + i * n;
      if (direct && dz != nullptr) row.e = dz;
    }
    if (!direct) {
      load(logits + i * n, z, n, padded);
      if (target != nullptr) {
        std::copy_n(row.target, n, y);
        std::fill(y + n, y + padded, A(0));
        row.target = y;
      }
    }
    if (loss != nullptr) row_statistics(row, value, stats);
    if (dz == nullptr) continue;
    row_gradient(row, stats, coefficient, loss != nullptr);
    if (!direct) store(row.e, dz, n);
  }
}

void run(const Inputs& in, const Outputs& out) {
  STD_TORCH_CHECK(in.labels.has_value() != in.target.has_value(), "incorrect_brier: needs labels or a target");
  STD_TORCH_CHECK(in.logits.is_contiguous() && (in.labels.has_value() ? in.labels : in.target)->is_contiguous() &&
                      (out.grad == nullptr || out.grad->is_contiguous()),
                  "incorrect_brier: logits, labels, target and grad must be contiguous");
  with_types(in.logits.scalar_type(), [&](auto t, auto a) {
    over_rows(in.logits.size(0), in.logits.size(1),
              [&](int64_t begin, int64_t end) { rows<decltype(t), decltype(a)>(in, out, begin, end); });
  });
}

std::tuple<Tensor, Tensor> incorrect_brier(Tensor logits, OptionalTensor labels, OptionalTensor target,
                                           int64_t ignore_index) {
  const ScalarType type = accumulate_type(logits.scalar_type());
  Tensor loss = empty(logits, {logits.size(0)}, type), stats = empty(logits, {logits.size(0), kBrierStats}, type);
  run({logits, labels, target, ignore_index}, {.loss = &loss, .stats = &stats});
  return {loss, stats};
}

Tensor incorrect_brier_backward(Tensor grad, Tensor logits, OptionalTensor labels, OptionalTensor target, Tensor stats,
                                int64_t ignore_index) {
  Tensor gradient = empty_gradient(logits);
  run({logits, labels, target, ignore_index}, {.gradient = &gradient, .stats = &stats, .grad = &grad});
  return gradient;
}

std::tuple<Tensor, Tensor> incorrect_brier_value_and_grad(Tensor logits, OptionalTensor labels, OptionalTensor target,
                                                          int64_t ignore_index, double coefficient) {
  const ScalarType type = accumulate_type(logits.scalar_type());
  Tensor loss = empty(logits, {logits.size(0)}, type), gradient = empty_gradient(logits);
  run({logits, labels, target, ignore_index}, {.loss = &loss, .gradient = &gradient, .coefficient = coefficient});
  return {scaled_sum(loss, coefficient), gradient};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("incorrect_brier", TORCH_BOX(&kdfast::cpu::incorrect_brier));
  m.impl("incorrect_brier_backward", TORCH_BOX(&kdfast::cpu::incorrect_brier_backward));
  m.impl("incorrect_brier_value_and_grad", TORCH_BOX(&kdfast::cpu::incorrect_brier_value_and_grad));
}
