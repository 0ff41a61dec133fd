// One row of kd_kl on the CPU: two sweeps, of which only the first reads memory. See kd_kl.cpp for the formula.
//
// Softmax does not see what is taken off a row, so the maximum need not be known beforehand: the largest of the row's
// first logits is taken off, and the true maximum is found in the same sweep. Where it lies so much higher that
// precision or range would suffer, the sweep is repeated with it.
#pragma once

#include "lanes.h"

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

// One row. T is the storage type of the logits and their gradients, A that of the arithmetic.
template <class T, class A>
struct Row {
  const T *student, *teacher;           // [n]
  const A* target;                      // [n], or null
  A *e_u, *e_v, *spare;                 // [n rounded up to whole lanes] each, scratch
  T *student_grad, *teacher_grad;       // [n], or null
  int64_t n;
  int64_t label;                        // or -1
  double tau_s, tau_t;
  double weight;                        // of this row in the loss
  double coefficient;                   // of the row's loss in the gradients
  bool temperature_grad;
  bool more;                            // a vector's length of the same tensors follows the row
  bool stream;                          // the gradients are too large to stay in a cache, and aligned
};

// How softmax(student) comes from softmax(student / tau_s): by squaring it this often, or by its own exponential.
constexpr int kOwnExp = 4, kNoHard = 5;
inline int hard_kind(double alpha, double tau_s) {
  if (alpha <= 0) return kNoHard;
  return tau_s == 1 ? 0 : tau_s == 2 ? 1 : tau_s == 4 ? 2 : tau_s == 8 ? 3 : kOwnExp;
}

// Logits in units of log 2, measured from the row's shift: y = (x - shift) / tau * log2(e).
template <class A>
struct Unit {
  A k, offset;
  Unit(double inverse_tau, A shift) : k(static_cast<A>(inverse_tau * kLog2e)), offset(-shift * k) {}
};
template <class A>
KDFAST_INLINE Lanes<A> in_units(Lanes<A> x, const Unit<A>& unit) {
  return x * unit.k + unit.offset;
}

// e^(student - shift), up to the power 1 / tau_s already in e.
template <int Hard, class A>
KDFAST_INLINE Lanes<A> hard_exp(Lanes<A> e, Lanes<A> x, const Unit<A>& one) {
  if constexpr (Hard == kOwnExp) return exp2_lanes(in_units(x, one));
  if constexpr (Hard >= 1 && Hard <= 3) e = e * e;
  if constexpr (Hard >= 2 && Hard <= 3) e = e * e;
  if constexpr (Hard == 3) e = e * e;
  return e;
}

template <class A>
struct Sums {
  A max_s, max_t;
  double z_u, z_v, z_1 = 0, cross;
};

// First sweep: e_u = 2^(y of the student), e_v = 2^(y of the teacher), their sums, and cross = sum w (k y_w - y_other), w the
// weighing one of the two; the maxima.
template <bool Reverse, int Hard, class T, class A>
KDFAST_INLINE Sums<A> exponentials(const Row<T, A>& row, Unit<A> u, Unit<A> v, Unit<A> one, A entropy) {
  constexpr A kMasked = -std::numeric_limits<A>::infinity();
  Lanes<A> max_s = broadcast(kMasked), max_t = broadcast(kMasked);
  Total<A> z_u, z_v, z_1, cross;
  for (int64_t begin = 0; begin < row.n; begin += kBlock) {
    over_lanes<A>(begin, begin + kBlock < row.n ? begin + kBlock : row.n, row.more, [&](int64_t j, auto count) KDFAST_INLINED {
      prefetch(row.student + j), prefetch(row.teacher + j);
      const Lanes<A> s = load(row.student + j, count, kMasked), t = load(row.teacher + j, count, kMasked);
      max_s = larger(s, max_s), max_t = larger(t, max_t);
      const Lanes<A> y_u = in_units(s, u), y_v = in_units(t, v);
      const Lanes<A> e_u = exp2_lanes(y_u), e_v = exp2_lanes(y_v);
      store_lanes(row.e_u + j, e_u);
      store_lanes(row.e_v + j, e_v);
      z_u.lanes += e_u, z_v.lanes += e_v;
      if constexpr (Hard != kNoHard && Hard != 0) z_1.lanes += hard_exp<Hard>(e_u, s, one);
      const Lanes<A> w = Reverse ? e_u : e_v;
      const Lanes<A> ratio = Reverse ? y_u - y_v : entropy * y_v - y_u;
      cross.lanes = w != A(0) ? cross.lanes + w * ratio : cross.lanes;  // 0 log 0 = 0
    });
    z_u.flush(), z_v.flush(), z_1.flush(), cross.flush();
  }
  Sums<A> sums{max_of<kCount<A>, A>(max_s), max_of<kCount<A>, A>(max_t), z_u.before, z_v.before, z_1.before, cross.before};
  if constexpr (Hard == 0) sums.z_1 = sums.z_u;
  return sums;
}

// The largest of the first 64 columns; the exact one where all of them are masked.
template <class T, class A>
KDFAST_INLINE A first_shift(const T* x, int64_t n, bool more) {
  constexpr A kMasked = -std::numeric_limits<A>::infinity();
  A shift = kMasked;
  for (int64_t end = n < 64 ? n : 64; shift == kMasked && end != 0; end = end == n ? 0 : n) {
    Lanes<A> max = broadcast(kMasked);
    over_lanes<A>(0, end, more, [&](int64_t j, auto count) KDFAST_INLINED { max = larger(load(x + j, count, kMasked), max); });
    shift = max_of<kCount<A>, A>(max);
  }
  return shift;
}

template <class O, class T, class A>
KDFAST_INLINE bool streams(const Row<T, A>& row, const O* out) {  // scratch is read again
  const void *to = out, *ds = row.student_grad, *dt = row.teacher_grad;
  return row.stream && (to == ds || to == dt);
}

// Writes the gradient whose lanes j, j + 1, ... are at(j, count), less `hard` in the column `label` (-1: none).
template <class O, class A, class At>
KDFAST_INLINE void write_gradient(O* out, int64_t n, bool more, bool stream, int64_t label, A hard, const At& at) {
  int64_t begin = 0;
  if (stream) {
    for (; begin + kCount<A> <= n; begin += kCount<A>) {
      stream_lanes(out + begin, at(begin, Whole{}));
    }
  }
  over_lanes<A>(begin, n, more, [&](int64_t j, auto count) KDFAST_INLINED { store(out + j, at(j, count), count); });
  if (label < 0) return;
  const int64_t first = label / kCount<A> * kCount<A>;
  A some[kCount<A>];
  store_lanes(some, n - first < kCount<A> ? at(first, Tail{n - first, more}) : at(first, Whole{}));
  narrow(some[label - first] - hard, &out[label]);
}

// g_u e_u - g_v e_v + g_1 softmax(student).
template <int Hard, class O, class T, class A>
KDFAST_INLINE void plain_gradient(const Row<T, A>& row, O* out, int64_t label, Unit<A> one, double g_u, double g_v, double g_1,
                                  double g_label) {
  const A by_u = static_cast<A>(g_u), by_v = static_cast<A>(g_v), by_1 = static_cast<A>(g_1);
  write_gradient(out, row.n, row.more, streams(row, out), label, static_cast<A>(g_label), [&](int64_t j, auto count) KDFAST_INLINED {
    const Lanes<A> e_u = load_lanes(row.e_u + j);
    Lanes<A> g = by_u * e_u - by_v * load_lanes(row.e_v + j);
    if constexpr (Hard == kOwnExp) g += by_1 * hard_exp<Hard>(e_u, load(row.student + j, count, A(0)), one);
    else if constexpr (Hard != kNoHard) g += by_1 * hard_exp<Hard>(e_u, e_u, one);
    return g;
  });
}

// The same in the logits of the weighing distribution: g w (r - D), r = k log w - log other. `shift` is what r - D and
// the y of its two logits differ by.
template <int Hard, class O, class T, class A>
KDFAST_INLINE void weighing_gradient(const Row<T, A>& row, const T* own, const T* other, const A* e_own, O* out, int64_t label,
                                     Unit<A> by_own, Unit<A> by_other, Unit<A> one, A entropy, double shift, double g, double g_1,
                                     double g_label) {
  const A by_g = static_cast<A>(g), by_1 = static_cast<A>(g_1), moved = static_cast<A>(shift), ln2 = static_cast<A>(kLn2);
  write_gradient(out, row.n, row.more, streams(row, out), label, static_cast<A>(g_label), [&](int64_t j, auto count) KDFAST_INLINED {
    const Lanes<A> x = load(own + j, count, A(0)), y = load(other + j, count, A(0)), e = load_lanes(e_own + j);
    const Lanes<A> r = ln2 * (entropy * in_units(x, by_own) - in_units(y, by_other)) + moved;
    Lanes<A> d = e == A(0) ? Lanes<A>{} : by_g * e * r;
    if constexpr (Hard != kNoHard) d += by_1 * hard_exp<kOwnExp>(e, x, one);
    return d;
  });
}

// <d, y> for a gradient d of the divergence and its logits in units y, for the temperatures. d sums to zero, so y may
// be shifted; shifted by its mean under softmax weights e, what rounding left in the sum of d does no harm.
template <class T, class A>
KDFAST_INLINE double centered_dot(const A* d, const A* e, const T* x, int64_t n, bool more, Unit<A> unit) {
  Total<A> total, sum, mean, mass;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    over_lanes<A>(begin, begin + kBlock < n ? begin + kBlock : n, more, [&](int64_t j, auto count) KDFAST_INLINED {
      const Lanes<A> y = in_units(load(x + j, count, A(0)), unit);
      const Lanes<A> g = load(d + j, count, A(0)), p = load(e + j, count, A(0));
      total.lanes = g != A(0) ? total.lanes + g * y : total.lanes;
      mean.lanes = p != A(0) ? mean.lanes + p * y : mean.lanes;
      sum.lanes += g, mass.lanes += p;
    });
    total.flush(), sum.flush(), mean.flush(), mass.flush();
  }
  return total.before - mean.before / mass.before * sum.before;
}

// The hard target: its total mass, and sum target (student - shift). Where ds is given, -g target is added to it, but
// for a label's own part, which write_gradient takes off.
struct HardSums {
  double mass = 0, weighted = 0;
};
template <class T, class A>
KDFAST_INLINE HardSums hard_target(const Row<T, A>& row, double smoothing, A shift, A* ds, A g) {
  const A masked = -std::numeric_limits<A>::infinity(), keep = static_cast<A>(1 - smoothing);
  HardSums sums;
  if (row.target == nullptr) {
    sums.mass = keep;
    sums.weighted = keep > 0 ? keep * static_cast<double>(widen(row.student[row.label]) - shift) : 0.0;
    if (smoothing <= 0) return sums;
  }
  A spread = 0;
  if (smoothing > 0) {
    int64_t finite = 0;
#pragma omp simd reduction(+ : finite)
    for (int64_t j = 0; j < row.n; ++j) finite += widen(row.student[j]) > masked;
    spread = static_cast<A>(smoothing / static_cast<double>(finite));
  }
  Total<A> mass, weighted;
  for (int64_t begin = 0; begin < row.n; begin += kBlock) {
    over_lanes<A>(begin, begin + kBlock < row.n ? begin + kBlock : row.n, row.more, [&](int64_t j, auto count) KDFAST_INLINED {
      const Lanes<A> s = load(row.student + j, count, masked);
      Lanes<A> p = s > masked ? broadcast(spread) : Lanes<A>{};
      if (row.target != nullptr) p += keep * load(row.target + j, count, A(0));
      mass.lanes += p;
      weighted.lanes = p != A(0) ? weighted.lanes + p * (s - shift) : weighted.lanes;
      if (ds != nullptr) store_lanes(ds + j, load_lanes(ds + j) - g * p);
    });
    mass.flush(), weighted.flush();
  }
  return {sums.mass + mass.before, sums.weighted + weighted.before};
}

template <bool Reverse, int Hard, class T, class A>
KDFAST_INLINE void row_as(const Row<T, A>& row, const Options& o, A* loss, A* stats) {
  const double tau_s = row.tau_s, tau_t = row.tau_t, keep = 1 - o.alpha;
  const double inverse_s = 1 / tau_s, inverse_t = 1 / tau_t;
  const double scale = o.scale == kTau2 ? tau_s * tau_s : o.scale == kProduct ? tau_s * tau_t : 1.0;
  const A k = o.divergence == kSoftCE ? A(0) : A(1);
  A shift_s = first_shift<T, A>(row.student, row.n, row.more), shift_t = first_shift<T, A>(row.teacher, row.n, row.more);
  Unit<A> u(inverse_s, shift_s), v(inverse_t, shift_t), one(1.0, shift_s);
  Sums<A> sums = exponentials<Reverse, Hard>(row, u, v, one, k);
  constexpr A kFar = 8, kFarOne = 60;  // in units: what costs three digits of log z; what overflows sums of e^student
  if (!((sums.max_s - shift_s) * u.k <= kFar && (sums.max_t - shift_t) * v.k <= kFar &&
        (Hard != kOwnExp || (sums.max_s - shift_s) * one.k <= kFarOne))) {
    shift_s = sums.max_s, shift_t = sums.max_t;
    u = {inverse_s, shift_s}, v = {inverse_t, shift_t}, one = {1.0, shift_s};
    sums = exponentials<Reverse, Hard>(row, u, v, one, k);
  }
  const double inverse_zu = 1 / sums.z_u, inverse_zv = 1 / sums.z_v;
  const double log_zu = std::log(sums.z_u), log_zv = std::log(sums.z_v);
  const double log_z1 = Hard == kNoHard ? 0.0 : std::log(sums.z_1), cross = kLn2 * sums.cross;
  const double d = Reverse ? cross * inverse_zu - log_zu + log_zv : cross * inverse_zv - k * log_zv + log_zu;
  HardSums hard;
  if constexpr (Hard != kNoHard) hard = hard_target<T, A>(row, o.label_smoothing, shift_s, nullptr, 0);

  // r - D of the weighing distribution less k y - y_other
  const double shift = Reverse ? log_zv - log_zu - d : log_zu - k * log_zv - d;
  const auto plain = [&](auto* out, double g) KDFAST_INLINED {  // (other - weighing) g
    const double sign = Reverse ? -1 : 1;
    plain_gradient<kNoHard>(row, out, -1, one, sign * g * inverse_zu, sign * g * inverse_zv, 0, 0);
  };
  const auto weighing = [&](auto* out, double g) KDFAST_INLINED {  // weighing (r - D) g
    if constexpr (Reverse) {
      weighing_gradient<kNoHard>(row, row.student, row.teacher, row.e_u, out, -1, u, v, one, k, shift, g * inverse_zu, 0, 0);
    } else {
      weighing_gradient<kNoHard>(row, row.teacher, row.student, row.e_v, out, -1, v, u, one, k, shift, g * inverse_zv, 0, 0);
    }
  };

  if (stats != nullptr) {
    const double ce = hard.mass * log_z1 - hard.weighted;
    const double soft = keep > 0 ? keep * scale * d : 0.0;
    *loss = static_cast<A>(row.weight * (soft + (Hard == kNoHard ? 0.0 : o.alpha * ce)));
    const double up_s = static_cast<double>(sums.max_s) - shift_s, up_t = static_cast<double>(sums.max_t) - shift_t;
    const double values[6] = {sums.max_s, sums.max_t, log_zu - up_s * inverse_s, log_zv - up_t * inverse_t,
                              Hard == kNoHard ? 0.0 : log_z1 - up_s, d};
    for (int i = 0; i < 6; ++i) stats[i] = static_cast<A>(values[i]);
    stats[6] = stats[7] = 0;
    if (row.temperature_grad) {
      const double scale_s = o.scale == kTau2 ? 2 * tau_s : o.scale == kProduct ? tau_t : 0.0;
      const double scale_t = o.scale == kProduct ? tau_s : 0.0;
      Reverse ? weighing(row.spare, 1) : plain(row.spare, 1);
      const double a_u = kLn2 * centered_dot(row.spare, row.e_u, row.student, row.n, row.more, u);
      Reverse ? plain(row.spare, 1) : weighing(row.spare, 1);
      const double b_v = kLn2 * centered_dot(row.spare, row.e_v, row.teacher, row.n, row.more, v);
      stats[6] = static_cast<A>(row.weight * keep * (scale_s * d - scale * a_u * inverse_s));
      stats[7] = static_cast<A>(row.weight * keep * (scale_t * d - scale * b_v * inverse_t));
    }
  }

  const double g = row.weight * row.coefficient * keep * scale;
  if (row.teacher_grad != nullptr) Reverse ? plain(row.teacher_grad, g * inverse_t) : weighing(row.teacher_grad, g * inverse_t);
  if (row.student_grad == nullptr) return;
  const double g_1 = row.weight * row.coefficient * o.alpha, g_softmax = Hard == kNoHard ? 0.0 : g_1 * hard.mass / sums.z_1;
  const double g_label = g_1 * (1 - o.label_smoothing);
  const auto student = [&](auto* out, int64_t label) KDFAST_INLINED {
    if constexpr (Reverse) {
      weighing_gradient<Hard>(row, row.student, row.teacher, row.e_u, out, label, u, v, one, k, shift, g * inverse_s * inverse_zu,
                              g_softmax, g_label);
    } else {
      plain_gradient<Hard>(row, out, label, one, g * inverse_s * inverse_zu, g * inverse_s * inverse_zv, g_softmax, g_label);
    }
  };
  if (Hard == kNoHard || (row.target == nullptr && o.label_smoothing <= 0)) {
    student(row.student_grad, Hard == kNoHard ? -1 : row.label);
  } else {  // through scratch, so that it is rounded once, when nothing more is to be added
    student(row.spare, row.target == nullptr ? row.label : -1);
    hard_target<T, A>(row, o.label_smoothing, shift_s, row.spare, static_cast<A>(g_1));
    write_gradient(row.student_grad, row.n, row.more, row.stream, -1, A(0),
                   [&](int64_t j, auto) KDFAST_INLINED { return load_lanes(row.spare + j); });
  }
}

template <class T, class A>
KDFAST_INLINE void compute_row(const Row<T, A>& row, const Options& o, A* loss, A* stats) {
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
