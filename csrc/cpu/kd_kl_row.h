// One row of kd_kl on the CPU: three sweeps over cache-resident columns. See kd_kl.cpp for the formula.
#pragma once

#include "vec.h"

namespace kdfast::cpu {

constexpr int64_t kStats = 8;  // the layout stands in kdfast/reference/kd_kl.py
enum Divergence { kForwardKL = 0, kReverseKL = 1, kSoftCE = 2, kJSD = 3, kDKD = 4 };
enum Scale { kTau2 = 0, kProduct = 1, kNone = 2 };

struct Options {
  double tau_s, tau_t, alpha, label_smoothing;
  int64_t ignore_index;
  int divergence, scale;
  double beta, target_weight;
};

// One row, widened to the arithmetic type and in cache.
template <class A>
struct Row {
  const A *student, *teacher, *target;  // [n]; target may be null
  A *e_u, *e_v, *spare;                 // [n] each, scratch; e_u may be the memory of student_grad
  A *student_grad, *teacher_grad;       // [n], or null
  int64_t n;                            // columns, the padding included
  int64_t label;                        // or -1
  double tau_s, tau_t;
  double weight;                        // of this row in the loss
  double coefficient;                   // of the row's loss in the gradients
  bool temperature_grad;
};

// How softmax(student) comes from softmax(student / tau_s): by squaring it this often, or by its own exponential.
constexpr int kOwnExp = 4, kNoHard = 5;
inline int hard_kind(double alpha, double tau_s) {
  if (alpha <= 0) return kNoHard;
  return tau_s == 1 ? 0 : tau_s == 2 ? 1 : tau_s == 4 ? 2 : tau_s == 8 ? 3 : kOwnExp;
}
template <int Hard, class A>
KDFAST_INLINE A hard_exp(A e, A shifted) {
  if constexpr (Hard == kOwnExp) return exp_nonpositive(shifted, ExpScale<A>(1.0));
  if constexpr (Hard >= 1 && Hard <= 3) e = e * e;
  if constexpr (Hard >= 2 && Hard <= 3) e = e * e;
  if constexpr (Hard == 3) e = e * e;
  return e;
}

struct Sums {
  double z_u = 0, z_v = 0, z_1 = 0, cross = 0;
};

// Second sweep: e_u = exp(u - max u), e_v = exp(v - max v), their sums, and
// cross = sum w (k log w - log other) up to the constants log z, w the weighing one of the two.
template <bool Reverse, int Hard, class A>
KDFAST_INLINE Sums exponentials(const A* s, const A* t, A* e_u, A* e_v, int64_t n, A max_s, A max_t,
                                double inverse_s, double inverse_t, A k) {
  Sums sums;
  const A per_s = static_cast<A>(inverse_s), per_t = static_cast<A>(inverse_t);
  const ExpScale<A> scale_s(inverse_s), scale_t(inverse_t);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    A z_u = 0, z_v = 0, z_1 = 0, cross = 0;
#pragma omp simd reduction(+ : z_u, z_v, z_1, cross)
    for (int64_t j = begin; j < end; ++j) {
      const A ds = s[j] - max_s, dt = t[j] - max_t;
      const A eu = exp_nonpositive(ds, scale_s), ev = exp_nonpositive(dt, scale_t);
      e_u[j] = eu;
      e_v[j] = ev;
      z_u += eu;
      z_v += ev;
      if constexpr (Hard != kNoHard && Hard != 0) z_1 += hard_exp<Hard>(eu, ds);
      const A u = ds * per_s, v = dt * per_t;
      const A weigh = Reverse ? eu : ev;
      const A log_ratio = Reverse ? u - v : k * v - u;
      cross += weigh == A(0) ? A(0) : weigh * log_ratio;
    }
    sums.z_u += z_u, sums.z_v += z_v, sums.z_1 += z_1, sums.cross += cross;
  }
  if constexpr (Hard == 0) sums.z_1 = sums.z_u;
  return sums;
}

// Third sweep, forward_kl and soft_ce: ds = g_u e_u - g_v e_v + g_1 softmax(student).
template <int Hard, class A>
KDFAST_INLINE void student_gradient(const A* s, const A* e_u, const A* e_v, A* ds, int64_t n, A max_s, A g_u, A g_v, A g_1) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    A g = g_u * e_u[j] - g_v * e_v[j];
    if constexpr (Hard != kNoHard) g += g_1 * hard_exp<Hard>(e_u[j], s[j] - max_s);
    ds[j] = g;
  }
}

// The same where the row weighs itself: w (r - D) with r = k log w - log other, scaled by g. For d/dstudent of
// reverse_kl and d/dteacher of the others.
template <class A>
KDFAST_INLINE void weighing_gradient(const A* own, const A* e_own, const A* other, A* out, int64_t n, A max_own, A max_other,
                                     A per_own, A per_other, A k, A r_shift, A g) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const A r = k * ((own[j] - max_own) * per_own) - (other[j] - max_other) * per_other + r_shift;
    out[j] = e_own[j] == A(0) ? A(0) : g * e_own[j] * r;
  }
}

// <d, x> for a gradient d of the divergence in the logits x, for the temperatures. d sums to zero, so x may be shifted;
// shifted by its mean under softmax weights e, what rounding left in the sum of d does no harm.
template <class A>
KDFAST_INLINE double centered_dot(const A* d, const A* e, const A* x, int64_t n, A max) {
  double total = 0, sum = 0, mean = 0, mass = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    A block_total = 0, block_sum = 0, block_mean = 0, block_mass = 0;
#pragma omp simd reduction(+ : block_total, block_sum, block_mean, block_mass)
    for (int64_t j = begin; j < end; ++j) {
      const A shifted = x[j] - max;
      block_total += d[j] == A(0) ? A(0) : d[j] * shifted;
      block_sum += d[j];
      block_mean += e[j] == A(0) ? A(0) : e[j] * shifted;
      block_mass += e[j];
    }
    total += block_total, sum += block_sum, mean += block_mean, mass += block_mass;
  }
  return total - mean / mass * sum;
}

// ds += g softmax(student) where e_u has been overwritten already.
template <class A>
KDFAST_INLINE void add_softmax(const A* s, A* ds, int64_t n, A max_s, A g) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) ds[j] += g * hard_exp<kOwnExp>(A(0), s[j] - max_s);
}

// The hard target: its total mass, and sum target (student - max). Where ds is given, -g target is added to it.
struct HardSums {
  double mass = 0, weighted = 0;
};
template <class A>
KDFAST_INLINE HardSums hard_target(const Row<A>& row, double smoothing, A max_s, A* ds, A g) {
  const A* s = row.student;
  const A masked = -std::numeric_limits<A>::infinity(), keep = static_cast<A>(1 - smoothing);
  HardSums sums;
  if (row.target == nullptr) {
    sums.mass = keep;
    sums.weighted = keep > 0 ? keep * static_cast<double>(s[row.label] - max_s) : 0.0;
    if (ds != nullptr) ds[row.label] -= g * keep;
    if (smoothing <= 0) return sums;
  }
  A spread = 0;
  if (smoothing > 0) {
    int64_t finite = 0;
#pragma omp simd reduction(+ : finite)
    for (int64_t j = 0; j < row.n; ++j) finite += s[j] > masked;
    spread = static_cast<A>(smoothing / static_cast<double>(finite));
  }
  for (int64_t begin = 0; begin < row.n; begin += kBlock) {
    const int64_t end = begin + kBlock < row.n ? begin + kBlock : row.n;
    A mass = 0, weighted = 0;
#pragma omp simd reduction(+ : mass, weighted)
    for (int64_t j = begin; j < end; ++j) {
      A p = s[j] > masked ? spread : A(0);
      if (row.target != nullptr) p += keep * row.target[j];
      mass += p;
      weighted += p == A(0) ? A(0) : p * (s[j] - max_s);
      if (ds != nullptr) ds[j] -= g * p;
    }
    sums.mass += mass, sums.weighted += weighted;
  }
  return sums;
}

template <bool Reverse, int Hard, class A>
KDFAST_INLINE void row_as(const Row<A>& row, const Options& o, A* loss, A* stats) {
  const A *s = row.student, *t = row.teacher;
  const int64_t n = row.n;
  const double tau_s = row.tau_s, tau_t = row.tau_t, keep = 1 - o.alpha;
  const double inverse_s = 1 / tau_s, inverse_t = 1 / tau_t;
  const double scale = o.scale == kTau2 ? tau_s * tau_s : o.scale == kProduct ? tau_s * tau_t : 1.0;
  const A k = o.divergence == kSoftCE ? A(0) : A(1);
  const A max_s = row_max(s, n), max_t = row_max(t, n);
  const Sums sums = exponentials<Reverse, Hard>(s, t, row.e_u, row.e_v, n, max_s, max_t, inverse_s, inverse_t, k);
  const double inverse_zu = 1 / sums.z_u, inverse_zv = 1 / sums.z_v;
  const double log_zu = std::log(sums.z_u), log_zv = std::log(sums.z_v), log_z1 = std::log(sums.z_1);
  const double d = Reverse ? sums.cross * inverse_zu - log_zu + log_zv : sums.cross * inverse_zv - k * log_zv + log_zu;
  HardSums hard;
  if constexpr (Hard != kNoHard) hard = hard_target<A>(row, o.label_smoothing, max_s, nullptr, 0);

  const A per_s = static_cast<A>(inverse_s), per_t = static_cast<A>(inverse_t);
  // r - D of the weighing distribution, as a shift of k (x - max) / tau - (other - max) / tau
  const A shift = static_cast<A>(Reverse ? log_zv - log_zu - d : log_zu - k * log_zv - d);
  const auto plain = [&](A* out, double g) {  // (other - weighing) g: a for forward_kl, b for reverse_kl
    const double sign = Reverse ? -1 : 1;
    student_gradient<kNoHard>(s, row.e_u, row.e_v, out, n, max_s, static_cast<A>(sign * g * inverse_zu),
                              static_cast<A>(sign * g * inverse_zv), A(0));
  };
  const auto weighing = [&](A* out, double g) {  // weighing (r - D) g
    if (Reverse) {
      weighing_gradient(s, row.e_u, t, out, n, max_s, max_t, per_s, per_t, k, shift, static_cast<A>(g * inverse_zu));
    } else {
      weighing_gradient(t, row.e_v, s, out, n, max_t, max_s, per_t, per_s, k, shift, static_cast<A>(g * inverse_zv));
    }
  };

  if (stats != nullptr) {
    const double ce = Hard == kNoHard ? 0.0 : hard.mass * log_z1 - hard.weighted;
    const double soft = keep > 0 ? keep * scale * d : 0.0;
    *loss = static_cast<A>(row.weight * (soft + (Hard == kNoHard ? 0.0 : o.alpha * ce)));
    const double values[6] = {static_cast<double>(max_s), static_cast<double>(max_t), log_zu, log_zv, log_z1, d};
    for (int i = 0; i < 6; ++i) stats[i] = static_cast<A>(values[i]);
    stats[6] = stats[7] = 0;
    if (row.temperature_grad) {
      const double scale_s = o.scale == kTau2 ? 2 * tau_s : o.scale == kProduct ? tau_t : 0.0;
      const double scale_t = o.scale == kProduct ? tau_s : 0.0;
      Reverse ? weighing(row.spare, 1) : plain(row.spare, 1);
      const double a_s = centered_dot(row.spare, row.e_u, s, n, max_s);
      Reverse ? plain(row.spare, 1) : weighing(row.spare, 1);
      const double b_t = centered_dot(row.spare, row.e_v, t, n, max_t);
      stats[6] = static_cast<A>(row.weight * keep * (scale_s * d - scale * a_s * inverse_s * inverse_s));
      stats[7] = static_cast<A>(row.weight * keep * (scale_t * d - scale * b_t * inverse_t * inverse_t));
    }
  }

  const double g = row.weight * row.coefficient * keep * scale;
  if (row.teacher_grad != nullptr) Reverse ? plain(row.teacher_grad, g * inverse_t) : weighing(row.teacher_grad, g * inverse_t);
  if (row.student_grad == nullptr) return;
  const double g_1 = row.weight * row.coefficient * o.alpha;
  const A g_softmax = static_cast<A>(g_1 * hard.mass / sums.z_1);
  if (Reverse) {
    weighing(row.student_grad, g * inverse_s);
    if constexpr (Hard != kNoHard) add_softmax(s, row.student_grad, n, max_s, g_softmax);
  } else {
    student_gradient<Hard>(s, row.e_u, row.e_v, row.student_grad, n, max_s, static_cast<A>(g * inverse_s * inverse_zu),
                           static_cast<A>(g * inverse_s * inverse_zv), g_softmax);
  }
  if constexpr (Hard != kNoHard) hard_target<A>(row, o.label_smoothing, max_s, row.student_grad, static_cast<A>(g_1));
}

template <class A>
KDFAST_INLINE void compute_row(const Row<A>& row, const Options& o, A* loss, A* stats) {
  const int hard = hard_kind(o.alpha, row.tau_s);
  if (o.divergence == kReverseKL) {
    return hard == kNoHard ? row_as<true, kNoHard>(row, o, loss, stats) : row_as<true, kOwnExp>(row, o, loss, stats);
  }
  switch (hard) {
    case 0: return row_as<false, 0>(row, o, loss, stats);
    case 1: return row_as<false, 1>(row, o, loss, stats);
    case 2: return row_as<false, 2>(row, o, loss, stats);
    case 3: return row_as<false, 3>(row, o, loss, stats);
    case kOwnExp: return row_as<false, kOwnExp>(row, o, loss, stats);
    default: return row_as<false, kNoHard>(row, o, loss, stats);
  }
}

}  // namespace kdfast::cpu
