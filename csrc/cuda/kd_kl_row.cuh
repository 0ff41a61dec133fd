// What the kernels of kd_kl share: the call, the scalars of a row, and the steps a group of threads takes
// over a row. Formulas: ../math/kd_kl.h, kd_kl_jsd.h, kd_kl_dkd.h.
//
//   sum_up        first sweep: the softmaxes' online sums, a KL's divergence, the hard labels' sums
//   look_again    second sweep, of what wants p and q normalised: jsd's divergence; temperature gradients
//   conclude      the row's loss and statistics
//   write         last sweep: the gradients, elementwise
//
// A sweep reads the row's tensors, or what an earlier sweep kept on chip of them (Slots).
#pragma once

#include <type_traits>

#include "../math/kd_kl_dkd.h"
#include "../math/kd_kl_jsd.h"
#include "kd_kl_launch.h"
#include "rows.cuh"

namespace kdfast::cuda {

using namespace kdfast::kd_kl;

// What a kernel is compiled for. Unless kMapped, logits are taken as they are.
template <class T_, class A_, Family kFamily_, bool kMapped_>
struct Form {
  using T = T_;
  using A = A_;
  static constexpr Family kFamily = kFamily_;
  static constexpr bool kMapped = kMapped_;
  static constexpr int N = kChunk<T>;
};

template <class T, class A>
struct Call {
  const T *student, *teacher;                          // [rows, classes]
  Column<A> student_temperature, teacher_temperature;  // [1] or [rows], or null
  Column<int64_t> labels;                              // [rows], or null
  const A* target;                                     // [rows, classes], or null
  Column<A> weight, grad;                              // [rows], or null
  A coefficient;                                       // of every row, where grad is null
  A *loss, *stats;                                     // [rows], [rows, kStats]
  A* parts;                                            // what the blocks that share a row hand on, or null
  T *student_grad, *teacher_grad;                      // [rows, classes], or null
  Options<A> options;
  int64_t rows;
  int classes, lanes, stage;
  bool aligned, temperature_grad;
};

// The scalars of one row, and its place.
template <class T, class A>
struct Row {
  const T *from = nullptr, *to = nullptr;  // the logits that weigh, and the others
  const A* target = nullptr;
  A tau_s = 1, tau_t = 1, per_tau_s = 1, per_tau_t = 1;  // the temperatures and their inverses
  A coefficient = 1;
  Units<A> unit{};
  int label = -1;       // -1: none
  bool counts = false;  // there is such a row, and its label is not ignore_index

  __device__ Row(const Call<T, A>& call, int64_t index) {
    const Options<A>& o = call.options;
    if (index >= call.rows) return;
    counts = true;
    if (call.weight.data != nullptr) coefficient = call.weight.at(index);
    const int64_t begin = index * call.classes;
    if (call.target != nullptr) target = call.target + begin;
    if (call.labels.data != nullptr) {
      const int64_t given = call.labels.at(index);
      counts = given != o.ignore_index;
      const bool exists = given >= 0 && given < call.classes;
      if (!exists) coefficient = NAN;  // the row's loss and gradients say so
      if (exists && target == nullptr) label = static_cast<int>(given);
    }
    tau_s = call.student_temperature.data != nullptr ? call.student_temperature.at(index) : o.tau_s;
    tau_t = call.teacher_temperature.data != nullptr ? call.teacher_temperature.at(index) : o.tau_t;
    per_tau_s = A(1) / tau_s, per_tau_t = A(1) / tau_t;
    from = (o.reverse ? call.student : call.teacher) + begin;
    to = (o.reverse ? call.teacher : call.student) + begin;
    const A k_s = A(kLog2e) * per_tau_s, k_t = A(kLog2e) * per_tau_t;
    unit = {o.reverse ? k_s : k_t, o.reverse ? k_t : k_s, o.entropy};
  }
};

template <class F, class A>
__device__ __forceinline__ A mapped(const Options<A>& o, A x) {
  if constexpr (F::kMapped) {
    if (!o.map.identity) return o.map.at(x);
  }
  return x;
}

// A chunk of logits in the arithmetic type, mapped.
template <class F, class A>
__device__ __forceinline__ void logits(const Vector<typename F::T>& v, const Options<A>& o, A (&out)[F::N]) {
  widen(v, out);
  if constexpr (F::kMapped) {
    if (!o.map.identity) {
#pragma unroll
      for (A& x : out) x = o.map.at(x);
    }
  }
}

// The label's logit, of dkd and of hard labels; -inf where there is none.
template <class F, class T, class A>
__device__ __forceinline__ A label_logit(const Call<T, A>& call, const Row<T, A>& row, const T* of) {
  return row.label < 0 ? -kInfinity<A> : mapped<F>(call.options, static_cast<A>(of[row.label]));
}

// ---------------------------------------------------------------- first sweep
template <class A>
struct Sums {
  DivergenceSums<A> soft;  // of dkd: over the classes other than the label
  HardSums<A> hard;
};

// With kKept, the chunks are kept in `slots`, and later sweeps find them there.
template <class F, bool kKept, class T, class A>
__device__ __forceinline__ void sum_up(const Call<T, A>& call, const Row<T, A>& row, const Chunks<F::N>& chunks,
                                       const Share& share, const Slots<T>& slots, DivergenceSums<A>& soft,
                                       HardSums<A>& hard) {
  constexpr int N = F::N;
  const Options<A>& o = call.options;
  const T masked = static_cast<T>(-kInfinity<A>);  // stands outside the row: a masked class adds nothing
  int turn = 0;
  for (int chunk = share.begin; chunk < share.end; chunk += share.step, ++turn) {
    const int first = chunks.first(chunk);
    A x[N], y[N];  // logits of from, of to
    const Vector<T> to = load(row.to, chunks, first, masked);
    const Vector<T> from = o.soft ? load(row.from, chunks, first, masked) : Vector<T>{};
    if constexpr (kKept) slots.put(turn, from, to);
    logits<F>(to, o, y);
    if (o.soft) logits<F>(from, o, x);
    if (o.hard) {
      A target[N] = {};
      if (row.target != nullptr) load_beside(row.target, chunks, first, A(0), target);
      if (o.reverse) hard.add(x, target);
      else hard.add(y, target);
    }
    if (o.soft) {
      if constexpr (F::kFamily == kDkd) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (first + i == row.label) x[i] = y[i] = -kInfinity<A>;
        }
      }
      soft.add(x, y, row.unit);
    }
  }
}

template <class Group, class A>
__device__ __forceinline__ void reduce(const Group& group, DivergenceSums<A>& sums, const Units<A>& unit) {
  group.reduce(sums, [&](DivergenceSums<A>& s, int lanes) {
    s.raise(max_over(s.from.max, lanes), max_over(s.to.max, lanes), unit);
    s.from.sum = sum_over(s.from.sum, lanes), s.to.sum = sum_over(s.to.sum, lanes);
    s.cross = sum_over(s.cross, lanes);
  });
}
template <class Group, class A>
__device__ __forceinline__ void reduce(const Group& group, HardSums<A>& sums) {
  group.reduce(sums, [](HardSums<A>& h, int lanes) {
    h.raise(max_over(h.softmax.max, lanes));
    h.softmax.sum = sum_over(h.softmax.sum, lanes);
    h.finite = sum_over(h.finite, lanes), h.finite_dot = sum_over(h.finite_dot, lanes);
    h.mass = sum_over(h.mass, lanes), h.dot = sum_over(h.dot, lanes);
  });
}

// ---------------------------------------------------------------- second sweep
template <class A, Family kFamily>
struct FamilyOf {
  using Gradient = DivergenceGradient<A>;
  using Second = TemperatureSums<A>;
};
template <class A>
struct FamilyOf<A, kJsd> {
  using Gradient = JsdGradient<A>;
  using Second = JsdSums<A>;
};
template <class A>
struct FamilyOf<A, kDkd> {
  using Gradient = DkdGradient<A>;
  using Second = DkdSums<A>;
};
template <class F>
using GradientOf = typename FamilyOf<typename F::A, F::kFamily>::Gradient;
template <class F>
using SecondOf = typename FamilyOf<typename F::A, F::kFamily>::Second;

// jsd's own divergence is not known yet: after the second sweep.
template <class F, class T, class A>
__device__ __forceinline__ GradientOf<F> gradient_of(const Call<T, A>& call, const Row<T, A>& row,
                                                     const DivergenceSums<A>& s) {
  const Options<A>& o = call.options;
  const A log2_z_from = log2_of(s.from.sum), log2_z_to = log2_of(s.to.sum);
  if constexpr (F::kFamily == kJsd) {
    return {row.unit, s.from.max, s.to.max, log2_z_from, log2_z_to, o.beta, A(0), A(0)};
  } else if constexpr (F::kFamily == kDkd) {
    return dkd_gradient(o, row.unit, s.from.max, s.to.max, log2_z_from, log2_z_to, nckd_of(s),
                        label_logit<F>(call, row, row.from), label_logit<F>(call, row, row.to));
  } else {
    return {row.unit, s.from.max, s.to.max, log2_z_from, log2_z_to, s.divergence(o.entropy)};
  }
}

template <class F, bool kKept, class T, class A>
__device__ __forceinline__ void look_again(const Call<T, A>& call, const Row<T, A>& row,
                                           const Chunks<F::N>& chunks, const Share& share,
                                           const Slots<T>& slots, const GradientOf<F>& gradient,
                                           SecondOf<F>& sums) {
  constexpr int N = F::N;
  const T masked = static_cast<T>(-kInfinity<A>);
  int turn = 0;
  for (int chunk = share.begin; chunk < share.end; chunk += share.step, ++turn) {
    const int first = chunks.first(chunk);
    const Vector<T> from = kKept ? slots.first(turn) : load(row.from, chunks, first, masked);
    const Vector<T> to = kKept ? slots.second(turn) : load(row.to, chunks, first, masked);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A x = mapped<F>(call.options, static_cast<A>(from.x[i]));
      A y = mapped<F>(call.options, static_cast<A>(to.x[i]));
      if constexpr (F::kFamily == kJsd) {
        sums.add(gradient, x, y, call.temperature_grad);
      } else {
        if constexpr (F::kFamily == kDkd) {
          if (first + i == row.label) x = y = -kInfinity<A>;
        }
        sums.add(gradient, x, y);
      }
    }
  }
}

// ---------------------------------------------------------------- loss and statistics
template <class F, class T, class A>
__device__ __forceinline__ void conclude(const Call<T, A>& call, const Row<T, A>& row, int64_t index,
                                         const DivergenceSums<A>& s, HardSums<A> hard,
                                         const GradientOf<F>& gradient, const SecondOf<F>& second) {
  const Options<A>& o = call.options;
  A out[kStats] = {};
  A loss = 0;
  if (row.counts) {
    if (o.hard) {
      out[kMaxS] = hard.softmax.max;
      out[kLogZ1] = A(kLn2) * log2_of(hard.softmax.sum);
      if (row.label >= 0) {
        const T* student = o.reverse ? row.from : row.to;
        hard.mass = A(1);
        hard.dot = (label_logit<F>(call, row, student) - base_of(hard.softmax.max)) * A(kLog2e);
      }
      loss = o.alpha * hard.cross_entropy(o);
    }
    if (o.soft) {
      const ScaleFactor<A> c = scale_factor(o.scale, row.tau_s, row.tau_t);
      A divergence;
      TemperatureSums<A> inner;
      if constexpr (F::kFamily == kJsd) {
        divergence = gradient.divergence(), inner = second.inner(o.beta);
        out[kD] = gradient.of_p, out[kLogZ1] = gradient.of_q;
      } else if constexpr (F::kFamily == kDkd) {
        divergence = gradient.divergence(o), inner = second.inner(gradient);
        out[kD] = gradient.others.divergence;
      } else {
        divergence = out[kD] = gradient.divergence, inner = second;
      }
      const A log_z_from = A(kLn2) * log2_of(s.from.sum), log_z_to = A(kLn2) * log2_of(s.to.sum);
      out[kMaxS] = o.reverse ? s.from.max : s.to.max;
      out[kMaxT] = o.reverse ? s.to.max : s.from.max;
      out[kLogZU] = o.reverse ? log_z_from : log_z_to;
      out[kLogZV] = o.reverse ? log_z_to : log_z_from;
      if (call.temperature_grad) {
        const A factor = row.coefficient * o.keep, unit = A(kLn2) * c.value;
        const A inner_s = o.reverse ? inner.from : inner.to, inner_t = o.reverse ? inner.to : inner.from;
        out[kGradTauS] = factor * (c.by_tau_s * divergence - unit * row.per_tau_s * inner_s);
        out[kGradTauT] = factor * (c.by_tau_t * divergence - unit * row.per_tau_t * inner_t);
      }
      loss += o.keep * c.value * divergence;
    }
    loss *= row.coefficient;
  }
  call.loss[index] = loss;
#pragma unroll
  for (int i = 0; i < kStats; ++i) call.stats[index * kStats + i] = out[i];
}

// ---------------------------------------------------------------- gradients
template <class F, bool kKept, class T, class A>
__device__ __forceinline__ void write(const Call<T, A>& call, const Row<T, A>& row, int64_t index,
                                      const Chunks<F::N>& chunks, const Share& share, const Slots<T>& slots,
                                      const GradientOf<F>& soft, const HardGradient<A>& hard) {
  constexpr int N = F::N;
  const Options<A>& o = call.options;
  const T masked = static_cast<T>(-kInfinity<A>);
  const A factor = row.coefficient * (call.grad.data != nullptr ? call.grad.at(index) : call.coefficient);
  const A c = row.counts ? o.keep * factor * scale_factor(o.scale, row.tau_s, row.tau_t).value : A(0);
  const A of_student = c * row.per_tau_s, of_teacher = c * row.per_tau_t, of_hard = o.alpha * factor;
  const int64_t begin = index * call.classes;
  int turn = 0;
  for (int chunk = share.begin; chunk < share.end; chunk += share.step, ++turn) {
    const int first = chunks.first(chunk);
    Vector<T> ds{}, dt{};
    if (row.counts) {  // an ignored row has gradient 0, whatever its logits hold
      const Vector<T> to = kKept ? slots.second(turn) : load(row.to, chunks, first, masked);
      Vector<T> from{};
      if (o.soft) from = kKept ? slots.first(turn) : load(row.from, chunks, first, masked);
      A target[N] = {};
      if (row.target != nullptr) load_beside(row.target, chunks, first, A(0), target);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool is_label = first + i == row.label;
        const A x = mapped<F>(o, static_cast<A>(from.x[i])), y = mapped<F>(o, static_cast<A>(to.x[i]));
        A by_student = 0, by_teacher = 0;
        if (o.soft) {
          A by_to, by_from;
          if constexpr (F::kFamily == kDkd) {
            const auto e = soft.at(is_label ? -kInfinity<A> : x, is_label ? -kInfinity<A> : y);
            by_to = is_label ? -soft.by_odds_q : soft.by_to(e);
            by_from = is_label ? -soft.by_odds_p : soft.by_from(e);
          } else {
            const auto e = soft.at(x, y);
            by_to = soft.by_to(e), by_from = soft.by_from(e);
          }
          by_student = of_student * (o.reverse ? by_from : by_to);
          by_teacher = of_teacher * (o.reverse ? by_to : by_from);
        }
        if (o.hard) by_student += of_hard * hard.at(o.reverse ? x : y, is_label ? A(1) : target[i]);
        if constexpr (F::kMapped) {
          if (!o.map.identity) {
            by_student *= o.map.slope(o.reverse ? x : y);
            by_teacher *= o.map.slope(o.reverse ? y : x);
          }
        }
        ds.x[i] = static_cast<T>(by_student), dt.x[i] = static_cast<T>(by_teacher);
      }
    }
    if (call.student_grad != nullptr) store(call.student_grad + begin, chunks, first, ds);
    if (call.teacher_grad != nullptr) store(call.teacher_grad + begin, chunks, first, dt);
  }
}

}  // namespace kdfast::cuda
