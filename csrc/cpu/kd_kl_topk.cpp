// kd_kl_topk on the CPU: KL to a teacher known by k classes and a tail. Formulas: ../math/kd_kl_topk.h.
//
//   loss = w tau^2 [ sum_listed p (log p - log q) + p_tail (log p_tail - log q_tail) ]
//
// Fused: the softmax, the tail's sums, the divergence, its gradients. Forward copies the row into scratch with the
// listed classes masked, so that the tail is summed directly; two more sweeps over scratch. Backward is one sweep, every
// class taken as tail, and then the k listed ones. The work on the k classes is in fp64.
// Memory for a row of C classes: forward reads C, backward reads and writes C; 12 bytes a class in fp32, 6 in bf16; and
// 16 k bytes a row each.
// Source: docs/math/kd_kl_topk.md.
#include <cmath>
#include <limits>
#include <vector>

#include "../math/kd_kl_topk.h"
#include "gradients.h"
#include "rows.h"

namespace kdfast::cpu {
namespace {

namespace topk = kdfast::kd_kl_topk;

struct TailSums {
  double max = 0, sum = 0, dot = 0;  // dot: sum of e (s - max) / tau
};

template <class A>
KDFAST_INLINE void sum_tail(const A* s, int64_t n, double inverse_tau, TailSums* out) {
  const A max = row_max(s, n), masked = -std::numeric_limits<A>::infinity();
  const A base = max == masked ? A(0) : max, per_tau = static_cast<A>(inverse_tau);
  const ExpScale<A> scale(inverse_tau);
  out->max = max;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    A sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t j = begin; j < end; ++j) {
      const A d = s[j] - base, e = exp_nonpositive(d, scale);
      sum += e;
      dot += e == A(0) ? A(0) : e * (d * per_tau);
    }
    out->sum += sum, out->dot += dot;
  }
}

// Every class as one of the tail; a listed one may lie above its maximum, gives nonsense, and is written again.
template <class T, class A>
KDFAST_INLINE void tail_gradient(const T* s, T* ds, int64_t n, A base, double inverse_tau, A g) {
  const ExpScale<A> scale(inverse_tau);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(g * exp_nonpositive(static_cast<A>(widen(s[j])) - base, scale), &ds[j]);
}

#define KDFAST_TOPK(T, A)                                                                                     \
  KDFAST_CLONES void gradient(const T* s, T* ds, int64_t n, A base, double inverse_tau, A g) {                \
    tail_gradient(s, ds, n, base, inverse_tau, g);                                                            \
  }
KDFAST_TOPK(float, float)
KDFAST_TOPK(double, double)
KDFAST_TOPK(BFloat16Bits, float)
KDFAST_TOPK(HalfBits, float)
#undef KDFAST_TOPK
KDFAST_CLONES void tail_sums(const float* s, int64_t n, double inverse_tau, TailSums* out) { sum_tail(s, n, inverse_tau, out); }
void tail_sums(const double* s, int64_t n, double inverse_tau, TailSums* out) { sum_tail(s, n, inverse_tau, out); }

struct TopkInputs {
  Tensor student, log_probs, indices;                  // [rows, classes], [rows, k], [rows, k]
  OptionalTensor student_temperature, labels, weight;  // [1] or [rows], [rows], [rows]
  double tau;
  int64_t ignore_index;

  bool ignored(int64_t row) const {
    const int64_t* given = data_or_null<int64_t>(labels);
    return given != nullptr && given[row] == ignore_index;
  }
};

template <class T, class A>
void forward_rows(const TopkInputs& in, bool temperature_grad, A* loss, A* stats, int64_t begin, int64_t end) {
  const int64_t n = in.student.size(1), k = in.indices.size(1), padded = padded_to_lanes(n);
  static thread_local std::vector<A> memory;  // kept between calls, so that no call faults pages in
  static thread_local std::vector<double> listed;
  if (static_cast<int64_t>(memory.size()) < padded) memory.resize(padded);
  listed.resize(k);
  const ValueOfRow<A> taus(in.student_temperature, in.tau), weights(in.weight, 1.0);
  A* const s = memory.data();
  constexpr double kInf = std::numeric_limits<double>::infinity();

  for (int64_t i = begin; i < end; ++i) {
    const int64_t* index = static_cast<const int64_t*>(in.indices.data_ptr()) + i * k;
    const A* log_p = static_cast<const A*>(in.log_probs.data_ptr()) + i * k;
    A* const out = stats + i * topk::kStats;
    const bool ignored = in.ignored(i), exist = std::all_of(index, index + k, [n](int64_t j) { return j >= 0 && j < n; });
    if (ignored || !exist) {
      loss[i] = ignored ? A(0) : std::numeric_limits<A>::quiet_NaN();
      std::fill_n(out, static_cast<int>(topk::kStats), loss[i]);
      continue;
    }
    load(static_cast<const T*>(in.student.data_ptr()) + i * n, s, n, padded);
    const double tau = taus[i], per_tau = 1 / tau;
    topk::Part<double> head{-kInf, 0};
    int64_t likeliest = 0;
    for (int64_t j = 0; j < k; ++j) {
      listed[j] = s[index[j]];
      head.max = std::max(head.max, listed[j]);
      if (log_p[j] > log_p[likeliest]) likeliest = j;
    }
    double others = 0, entropy = 0;
    for (int64_t j = 0; j < k; ++j) {
      s[index[j]] = -std::numeric_limits<A>::infinity();
      if (head.max > -kInf) head.sum += std::exp((listed[j] - head.max) * per_tau);
      const double p = std::exp(static_cast<double>(log_p[j]));
      if (j != likeliest) others += p;
      entropy -= p == 0 ? 0 : p * log_p[j];
    }
    if (head.max == -kInf) head.max = std::numeric_limits<double>::lowest();  // all masked: a part of sum 0
    TailSums tail;
    tail_sums(s, padded, per_tau, &tail);
    const double p_tail = k == n ? 0.0 : topk::tail_probability<A, double>(log_p[likeliest], others, entropy);
    const auto row = topk::row_of(head, topk::Part<double>{tail.max, tail.sum}, per_tau, p_tail);
    double d = topk::tail_divergence(row);
    double inner = tail.sum == 0 ? 0 : row.g * (tail.dot + tail.sum * ((tail.max - row.max) * per_tau));  // <dD/du, u>
    for (int64_t j = 0; j < k; ++j) {
      const double u = (listed[j] - row.max) * per_tau, log_q = u - row.log_z, p = std::exp(static_cast<double>(log_p[j]));
      d += p == 0 ? 0 : p * (log_p[j] - log_q);
      inner += u == -kInf ? 0 : (std::exp(log_q) - p) * u;
    }
    const double weight = weights[i];
    loss[i] = static_cast<A>(weight * tau * tau * d);
    out[topk::kMax] = static_cast<A>(row.max), out[topk::kLogZ] = static_cast<A>(row.log_z);
    out[topk::kMaxTail] = static_cast<A>(row.max_tail), out[topk::kG] = static_cast<A>(row.g);
    out[topk::kGradTau] = temperature_grad ? static_cast<A>(weight * tau * (2 * d - inner)) : A(0);
  }
}

template <class T, class A>
void backward_rows(const TopkInputs& in, const A* grad, const A* stats, T* ds, int64_t begin, int64_t end) {
  const int64_t n = in.student.size(1), k = in.indices.size(1);
  const ValueOfRow<A> taus(in.student_temperature, in.tau), weights(in.weight, 1.0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t* index = static_cast<const int64_t*>(in.indices.data_ptr()) + i * k;
    const A *log_p = static_cast<const A*>(in.log_probs.data_ptr()) + i * k, *row = stats + i * topk::kStats;
    const T* s = static_cast<const T*>(in.student.data_ptr()) + i * n;
    T* const out = ds + i * n;
    if (in.ignored(i)) {
      T zero;
      narrow(A(0), &zero);
      std::fill_n(out, n, zero);
      continue;
    }
    const double tau = taus[i], per_tau = 1 / tau, factor = static_cast<double>(grad[i]) * weights[i] * tau;
    const A base = row[topk::kMaxTail] == -std::numeric_limits<A>::infinity() ? A(0) : row[topk::kMaxTail];
    gradient(s, out, n, base, per_tau, static_cast<A>(factor * row[topk::kG]));
    for (int64_t j = 0; j < k; ++j) {
      if (index[j] < 0 || index[j] >= n) continue;  // and the row is NaN by its statistics
      const double u = (static_cast<double>(widen(s[index[j]])) - row[topk::kMax]) * per_tau;
      narrow(static_cast<A>(factor * (std::exp(u - row[topk::kLogZ]) - std::exp(static_cast<double>(log_p[j])))), &out[index[j]]);
    }
  }
}

void check_contiguous(const TopkInputs& in) {
  STD_TORCH_CHECK(in.student.is_contiguous() && in.log_probs.is_contiguous() && in.indices.is_contiguous(),
                  "kd_kl_topk: student, teacher_log_probs and indices must be contiguous");
}

std::tuple<Tensor, Tensor> kd_kl_topk(Tensor student, Tensor log_probs, Tensor indices, OptionalTensor student_temperature,
                                      OptionalTensor labels, OptionalTensor weight, double tau_s, int64_t ignore_index,
                                      bool temperature_grad) {
  const TopkInputs in{student, log_probs, indices, student_temperature, labels, weight, tau_s, ignore_index};
  check_contiguous(in);
  const int64_t n = student.size(0);
  Tensor loss = empty(student, {n}, accumulate_type(student.scalar_type()));
  Tensor stats = empty(student, {n, topk::kStats}, loss.scalar_type());
  with_types(student.scalar_type(), [&](auto t, auto a) {
    using A = decltype(a);
    over_rows(n, student.size(1), [&](int64_t begin, int64_t end) {
      forward_rows<decltype(t), A>(in, temperature_grad, static_cast<A*>(loss.data_ptr()), static_cast<A*>(stats.data_ptr()),
                                   begin, end);
    });
  });
  return {loss, stats};
}

Tensor kd_kl_topk_backward(Tensor grad, Tensor student, Tensor log_probs, Tensor indices, OptionalTensor student_temperature,
                           OptionalTensor labels, OptionalTensor weight, Tensor stats, double tau_s, int64_t ignore_index) {
  const TopkInputs in{student, log_probs, indices, student_temperature, labels, weight, tau_s, ignore_index};
  check_contiguous(in);
  const int64_t n = student.size(0);
  Tensor ds = empty_gradient(student);
  with_types(student.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    over_rows(n, student.size(1), [&](int64_t begin, int64_t end) {
      backward_rows<T, A>(in, static_cast<const A*>(grad.data_ptr()), static_cast<const A*>(stats.data_ptr()),
                          static_cast<T*>(ds.data_ptr()), begin, end);
    });
  });
  return ds;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("kd_kl_topk", TORCH_BOX(&kdfast::cpu::kd_kl_topk));
  m.impl("kd_kl_topk_backward", TORCH_BOX(&kdfast::cpu::kd_kl_topk_backward));
}
