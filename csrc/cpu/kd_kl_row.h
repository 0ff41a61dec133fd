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

// How softmax(student) comes from softmax(student / tau_s): by squaring it, where tau_s is 1, 2, 4 or 8, or by its own
// exponential.
enum Hard { kNoHard, kSquares, kOwnExp };

// Logits in units of log 2, measured from the row's shift: y = (x - shift) / tau * log2(e). The difference first: far
// from zero a product of the shift would round by more than the whole distance is to be known.
template <class A>
struct Unit {
  A k, shift;
  Unit(double inverse_tau, A shift) : k(static_cast<A>(inverse_tau * kLog2e)), shift(shift) {}
};
template <class A>
KDFAST_INLINE Lanes<A> in_units(Lanes<A> x, const Unit<A>& unit) {
  return (x - unit.shift) * unit.k;
}

// What the sweeps of one row share.
template <class A>
struct Found {
  Unit<A> u, v, one;     // of student / tau_s, teacher / tau_t, student
  A shift_s, shift_t, max_s, max_t, entropy;
  int squares;           // tau_s = 2^squares
  double z_u, z_v, z_1, cross;
  double scale, by_zu, by_zv, d;
  double shift;          // r - D of the weighing distribution less (k y - y_other)
};

// total += factor e^(student - shift), given e = 2^(y of student / tau_s) and the student's logits x.
template <int Squares, class A>
KDFAST_INLINE void add_power(Lanes<A>& total, A factor, const Lanes<A>& e) {
#pragma omp simd
  for (int i = 0; i < kCount<A>; ++i) {
    A y = e[i];
    for (int k = 0; k < Squares; ++k) y *= y;
    total[i] += factor * y;
  }
}
template <Hard kHard, class A>
KDFAST_INLINE void add_hard_exp(Lanes<A>& total, A factor, const Lanes<A>& e, const Lanes<A>& x, const Found<A>& f) {
  if constexpr (kHard == kOwnExp) return add(total, factor * exp2_lanes(in_units(x, f.one)));
  switch (f.squares) {
    case 0: return add_power<0>(total, factor, e);
    case 1: return add_power<1>(total, factor, e);
    case 2: return add_power<2>(total, factor, e);
    default: return add_power<3>(total, factor, e);
  }
}

// First sweep: e_u = 2^(y of the student), e_v = 2^(y of the teacher), their sums, and cross = sum w (k y_w - y_other), w the
// weighing one of the two; the maxima.
template <bool Reverse, Hard kHard, class T, class A>
KDFAST_INLINE void exponentials(const Row<T, A>& row, Found<A>& f) {
  constexpr A kMasked = -std::numeric_limits<A>::infinity();
  const Unit<A> u = f.u, v = f.v;
  const A entropy = f.entropy;
  Lanes<A> max_s = broadcast(kMasked), max_t = broadcast(kMasked);
  Total<A> z_u, z_v, z_1, cross;
  // What the second sweep writes, called while this one computes: 4096 x 1000 took 14 % longer without.
  const T* written = row.student_grad == nullptr || row.stream ? row.student : row.student_grad;
  for (int64_t begin = 0; begin < row.n; begin += kBlock) {
    over_lanes<A>(begin, begin + kBlock < row.n ? begin + kBlock : row.n, row.more, [&](int64_t j, auto count) KDFAST_INLINED {
      prefetch(row.student + j), prefetch(row.teacher + j);
      __builtin_prefetch(written + j, 1, 2);
      const Lanes<A> s = load(row.student + j, count, kMasked), t = load(row.teacher + j, count, kMasked);
      raise(max_s, s), raise(max_t, t);
      const Lanes<A> y_u = in_units(s, u), y_v = in_units(t, v);
      const Lanes<A> e_u = exp2_lanes(y_u), e_v = exp2_lanes(y_v);
      store_lanes(row.e_u + j, e_u);
      store_lanes(row.e_v + j, e_v);
      add(z_u.lanes, e_u), add(z_v.lanes, e_v);
      if constexpr (kHard != kNoHard) add_hard_exp<kHard>(z_1.lanes, A(1), e_u, s, f);
      const Lanes<A> w = Reverse ? e_u : e_v;
      const Lanes<A> ratio = Reverse ? y_u - y_v : entropy * y_v - y_u;
      add_where_nonzero(cross.lanes, w, w * ratio);
    });
    z_u.flush(), z_v.flush(), cross.flush();
    if constexpr (kHard != kNoHard) z_1.flush();
  }
  f.max_s = max_of<A>(max_s), f.max_t = max_of<A>(max_t);
  f.z_u = z_u.before, f.z_v = z_v.before, f.z_1 = z_1.before, f.cross = kLn2 * cross.before;
}

// The largest of the first 64 columns; the exact one where all of them are masked.
template <class T, class A>
KDFAST_INLINE A first_shift(const T* x, int64_t n, bool more) {
  constexpr A kMasked = -std::numeric_limits<A>::infinity();
  A shift = kMasked;
  for (int64_t end = n < 64 ? n : 64; shift == kMasked && end != 0; end = end == n ? 0 : n) {
    Lanes<A> max = broadcast(kMasked);
    over_lanes<A>(0, end, more, [&](int64_t j, auto count) KDFAST_INLINED { raise(max, load(x + j, count, kMasked)); });
    shift = max_of<A>(max);
  }
  return shift;
}

template <class O, class T, class A>
KDFAST_INLINE bool streams(const Row<T, A>& row, const O* out) {  // scratch is read again
  const void *to = out, *ds = row.student_grad, *dt = row.teacher_grad;
  return row.stream && (to == ds || to == dt);
}

// Writes the gradient whose lanes j, j + 1, ... at(j, count, lanes) gives, less `hard` in the column `label` (-1: none).
template <class O, class A, class At>
KDFAST_INLINE void write_gradient(O* out, int64_t n, bool more, bool stream, int64_t label, A hard, const At& at) {
  int64_t begin = 0;
  if (stream) {
    for (; begin + kCount<A> <= n; begin += kCount<A>) {
      Lanes<A> d;
      at(begin, Whole{}, d);
      stream_lanes(out + begin, d);
    }
  }
  over_lanes<A>(begin, n, more, [&](int64_t j, auto count) KDFAST_INLINED {
    Lanes<A> d;
    at(j, count, d);
    store(out + j, d, count);
  });
  if (label < 0) return;
  const int64_t first = label / kCount<A> * kCount<A>;
  Lanes<A> d;
  n - first < kCount<A> ? at(first, Tail{n - first, more}, d) : at(first, Whole{}, d);
  narrow(d[label - first] - hard, &out[label]);
}

// (other - weighing) g: g_u e_u - g_v e_v, and g_1 softmax(student) less g_label at the label (-1: none).
template <bool Reverse, Hard kHard, class O, class T, class A>
KDFAST_INLINE void plain_gradient(const Row<T, A>& row, const Found<A>& f, O* out, double g, double g_1, int64_t label,
                                  double g_label) {
  const double sign = Reverse ? -g : g;
  const A by_u = static_cast<A>(sign * f.by_zu), by_v = static_cast<A>(sign * f.by_zv), by_1 = static_cast<A>(g_1);
  write_gradient(out, row.n, row.more, streams(row, out), label, static_cast<A>(g_label),
                 [&](int64_t j, auto count, Lanes<A>& d) KDFAST_INLINED {
    const Lanes<A> e_u = load_lanes(row.e_u + j);
    d = by_u * e_u - by_v * load_lanes(row.e_v + j);
    if constexpr (kHard == kOwnExp) add_hard_exp<kHard>(d, by_1, e_u, load(row.student + j, count, A(0)), f);
    if constexpr (kHard == kSquares) add_hard_exp<kHard>(d, by_1, e_u, e_u, f);
  });
}

// weighing (r - D) g, r = k log weighing - log other; and the hard part, as above.
template <bool Reverse, Hard kHard, class O, class T, class A>
KDFAST_INLINE void weighing_gradient(const Row<T, A>& row, const Found<A>& f, O* out, double g, double g_1, int64_t label,
                                     double g_label) {
  const T *own = Reverse ? row.student : row.teacher, *other = Reverse ? row.teacher : row.student;
  const A* e_own = Reverse ? row.e_u : row.e_v;
  const Unit<A> by_own = Reverse ? f.u : f.v, by_other = Reverse ? f.v : f.u;
  const A by_g = static_cast<A>(g * (Reverse ? f.by_zu : f.by_zv)), by_1 = static_cast<A>(g_1);
  const A entropy = f.entropy, moved = static_cast<A>(f.shift), ln2 = static_cast<A>(kLn2);
  write_gradient(out, row.n, row.more, streams(row, out), label, static_cast<A>(g_label),
                 [&](int64_t j, auto count, Lanes<A>& d) KDFAST_INLINED {
    const Lanes<A> x = load(own + j, count, A(0)), y = load(other + j, count, A(0)), e = load_lanes(e_own + j);
    const Lanes<A> r = ln2 * (entropy * in_units(x, by_own) - in_units(y, by_other)) + moved;
    d = where_nonzero(e, by_g * e * r);
    if constexpr (kHard != kNoHard) add_hard_exp<kOwnExp>(d, by_1, e, x, f);
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
      add_where_nonzero(total.lanes, g, g * y);
      add_where_nonzero(mean.lanes, p, p * y);
      add(sum.lanes, g), add(mass.lanes, p);
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
      Lanes<A> p;
#pragma omp simd
      for (int64_t i = 0; i < kCount<A>; ++i) p[i] = s[i] > masked ? spread : A(0);
      if (row.target != nullptr) p += keep * load(row.target + j, count, A(0));
      add(mass.lanes, p);
      add_where_nonzero(weighted.lanes, p, p * (s - shift));
      if (ds != nullptr) store_lanes(ds + j, load_lanes(ds + j) - g * p);
    });
    mass.flush(), weighted.flush();
  }
  return {sums.mass + mass.before, sums.weighted + weighted.before};
}

// d loss / d (tau_s, tau_t), into the statistics 6 and 7.
template <bool Reverse, class T, class A>
KDFAST_INLINE void temperature_gradients(const Row<T, A>& row, const Found<A>& f, const Options& o, A* stats) {
  const double keep = 1 - o.alpha;
  const double scale_s = o.scale == kTau2 ? 2 * row.tau_s : o.scale == kProduct ? row.tau_t : 0.0;
  const double scale_t = o.scale == kProduct ? row.tau_s : 0.0;
  for (const bool of_student : {true, false}) {
    if (of_student == Reverse) weighing_gradient<Reverse, kNoHard>(row, f, row.spare, 1, 0, -1, 0);
    else plain_gradient<Reverse, kNoHard>(row, f, row.spare, 1, 0, -1, 0);
    const double tau = of_student ? row.tau_s : row.tau_t;
    const double inner = kLn2 * centered_dot(row.spare, of_student ? row.e_u : row.e_v, of_student ? row.student : row.teacher,
                                             row.n, row.more, of_student ? f.u : f.v);
    const double value = row.weight * keep * ((of_student ? scale_s : scale_t) * f.d - f.scale * inner / tau);
    stats[of_student ? 6 : 7] = static_cast<A>(value);
  }
}

template <bool Reverse, class T, class A>
KDFAST_INLINE void teacher_gradient(const Row<T, A>& row, const Found<A>& f, double g) {
  if constexpr (Reverse) plain_gradient<Reverse, kNoHard>(row, f, row.teacher_grad, g / row.tau_t, 0, -1, 0);
  else weighing_gradient<Reverse, kNoHard>(row, f, row.teacher_grad, g / row.tau_t, 0, -1, 0);
}

// The student's gradient with label smoothing or target probabilities: through scratch, so that it is rounded once,
// when nothing more is to be added.
template <bool Reverse, class T, class A>
KDFAST_INLINE void spread_gradient(const Row<T, A>& row, const Found<A>& f, const Options& o, double g, double g_1, double mass) {
  const double g_softmax = g_1 * mass / f.z_1, g_label = g_1 * (1 - o.label_smoothing);
  const int64_t label = row.target == nullptr ? row.label : -1;
  if constexpr (Reverse) weighing_gradient<Reverse, kOwnExp>(row, f, row.spare, g / row.tau_s, g_softmax, label, g_label);
  else plain_gradient<Reverse, kOwnExp>(row, f, row.spare, g / row.tau_s, g_softmax, label, g_label);
  hard_target<T, A>(row, o.label_smoothing, f.shift_s, row.spare, static_cast<A>(g_1));
  write_gradient(row.student_grad, row.n, row.more, row.stream, -1, A(0),
                 [&](int64_t j, auto, Lanes<A>& d) KDFAST_INLINED { d = load_lanes(row.spare + j); });
}

// What few rows need is compiled once, apart from the sweeps that are compiled for every kind of row.
template <class T, class A>
struct Rare {
  HardSums (*spread_target)(const Row<T, A>&, double smoothing, A shift);
  void (*temperatures)(const Row<T, A>&, const Found<A>&, const Options&, A* stats);
  void (*teacher)(const Row<T, A>&, const Found<A>&, const Options&, double g);
  void (*spread)(const Row<T, A>&, const Found<A>&, const Options&, double g, double g_1, double mass);
};

template <bool Reverse, Hard kHard, class T, class A>
KDFAST_INLINE void row_as(const Row<T, A>& row, const Options& o, const Rare<T, A>& rare, A* loss, A* stats) {
  const double keep = 1 - o.alpha;
  A shift_s = first_shift<T, A>(row.student, row.n, row.more), shift_t = first_shift<T, A>(row.teacher, row.n, row.more);
  Found<A> f{{1 / row.tau_s, shift_s}, {1 / row.tau_t, shift_t}, {1.0, shift_s}, shift_s, shift_t};
  f.squares = row.tau_s == 8 ? 3 : row.tau_s == 4 ? 2 : row.tau_s == 2 ? 1 : 0;
  f.entropy = o.divergence == kSoftCE ? A(0) : A(1);
  f.scale = o.scale == kTau2 ? row.tau_s * row.tau_s : o.scale == kProduct ? row.tau_s * row.tau_t : 1.0;
  for (bool again = true; again;) {
    exponentials<Reverse, kHard>(row, f);
    constexpr A kFar = 8, kFarOne = 60;  // in units: what costs three digits of log z; what overflows sums of e^student
    const A far_s = f.max_s - f.shift_s, far_t = f.max_t - f.shift_t;
    again = far_s * f.u.k > kFar || far_t * f.v.k > kFar || (kHard == kOwnExp && far_s * f.one.k > kFarOne);
    if (again) {
      f.shift_s = f.max_s, f.shift_t = f.max_t;
      f.u = {1 / row.tau_s, f.max_s}, f.v = {1 / row.tau_t, f.max_t}, f.one = {1.0, f.max_s};
      again = f.max_s < std::numeric_limits<A>::infinity() && f.max_t < std::numeric_limits<A>::infinity();
    }
  }
  f.by_zu = 1 / f.z_u, f.by_zv = 1 / f.z_v;
  const double log_zu = std::log(f.z_u), log_zv = std::log(f.z_v), log_z1 = kHard == kNoHard ? 0.0 : std::log(f.z_1);
  f.d = Reverse ? f.cross * f.by_zu - log_zu + log_zv : f.cross * f.by_zv - f.entropy * log_zv + log_zu;
  f.shift = Reverse ? log_zv - log_zu - f.d : log_zu - f.entropy * log_zv - f.d;
  const bool spread = kHard != kNoHard && (row.target != nullptr || o.label_smoothing > 0);
  HardSums hard;
  if (spread) hard = rare.spread_target(row, o.label_smoothing, f.shift_s);
  else if (kHard != kNoHard) hard = {1, static_cast<double>(widen(row.student[row.label])) - f.shift_s};

  if (stats != nullptr) {
    const double soft = keep > 0 ? keep * f.scale * f.d : 0.0;
    *loss = static_cast<A>(row.weight * (kHard == kNoHard ? soft : soft + o.alpha * (hard.mass * log_z1 - hard.weighted)));
    const double up_s = static_cast<double>(f.max_s) - f.shift_s, up_t = static_cast<double>(f.max_t) - f.shift_t;
    const double values[kStats] = {f.max_s, f.max_t, log_zu - up_s / row.tau_s, log_zv - up_t / row.tau_t,
                                   kHard == kNoHard ? 0.0 : log_z1 - up_s, f.d};
    for (int i = 0; i < kStats; ++i) stats[i] = static_cast<A>(values[i]);
    if (row.temperature_grad) rare.temperatures(row, f, o, stats);
  }

  const double g = row.weight * row.coefficient * keep * f.scale, g_1 = row.weight * row.coefficient * o.alpha;
  if (row.teacher_grad != nullptr) rare.teacher(row, f, o, g);
  if (row.student_grad == nullptr) return;
  if (spread) return rare.spread(row, f, o, g, g_1, hard.mass);
  const double g_softmax = kHard == kNoHard ? 0.0 : g_1 / f.z_1;
  const int64_t label = kHard == kNoHard ? -1 : row.label;
  if constexpr (Reverse) weighing_gradient<Reverse, kHard>(row, f, row.student_grad, g / row.tau_s, g_softmax, label, g_1);
  else plain_gradient<Reverse, kHard>(row, f, row.student_grad, g / row.tau_s, g_softmax, label, g_1);
}

template <class T, class A>
KDFAST_INLINE void compute_row(const Row<T, A>& row, const Options& o, const Rare<T, A>& rare, A* loss, A* stats) {
  const double tau = row.tau_s;
  const bool none = o.alpha <= 0, squares = tau == 1 || tau == 2 || tau == 4 || tau == 8;
  if (o.divergence == kReverseKL) {
    if (none) return row_as<true, kNoHard>(row, o, rare, loss, stats);
    return row_as<true, kOwnExp>(row, o, rare, loss, stats);
  }
  if (none) return row_as<false, kNoHard>(row, o, rare, loss, stats);
  if (squares) return row_as<false, kSquares>(row, o, rare, loss, stats);
  return row_as<false, kOwnExp>(row, o, rare, loss, stats);
}

}  // namespace kdfast::cpu
