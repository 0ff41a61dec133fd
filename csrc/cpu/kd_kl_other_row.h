// One row of kd_kl on the CPU for the divergences that are no plain KL, and the softcap of the logits.
//
//   jsd: D = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
//        dD/du = q (f - <q, f>), f = (1 - beta) log(q / m)     dD/dv = p (h - <p, h>), h = beta log(p / m)
//   dkd: D = target_weight T + beta N;  q^, p^: softmax over the classes other than the label t
//        T = KL((p_t, 1 - p_t) || (q_t, 1 - q_t)),  N = KL(p^ || q^)
//        dD/du = target_weight (q_t - p_t) (e_t - q^) + beta (q^ - p^)
//        dD/dv = target_weight p_t (1 - p_t) (odds_v - odds_u) (e_t - p^) + beta p^ (log p^ - log q^ - N)
//   softcap: x' = softcap tanh(logit_scale x / softcap), dx'/dx = logit_scale (1 - (x' / softcap)^2)
//
// Fused as in kd_kl_row.h, with the row in cache: maxima; exponentials; for jsd the two logarithms of ratios to the
// mixture; the gradient. Bytes an element from memory: 3 passes, as for a KL. Sources: Agarwal et al. 2023
// (arXiv:2306.13649); Zhao et al. 2022 (arXiv:2203.08679); docs/math/kd_kl.md.
#pragma once

#include "kd_kl_row.h"

#define KDFAST_MEMBER inline __attribute__((always_inline))

namespace kdfast::cpu {

// log x for x >= 0, given x - 1 as well: x = 2^k m with m in [sqrt 1/2, sqrt 2), log m = f - f^2/2 + f^3 P(f),
// f = m - 1, P a minimax polynomial of degree 7 (relative error of log 6e-9). For k = 0 f is the x - 1 given, so that
// next to 1 it keeps digits that x has not. Finite for x = 0, where it is weighed by 0; NaN for NaN.
KDFAST_INLINE float log_of(float x, float less_one) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t k = (bits - 0x3f3504f3) >> 23;
  bits -= static_cast<int32_t>(static_cast<uint32_t>(k) << 23);
  float m;
  std::memcpy(&m, &bits, 4);
  const float f = k == 0 ? less_one : m - 1.0f, n = static_cast<float>(k);
  float p = -7.6344964e-2f;
  p = p * f + 1.2761577e-1f;
  p = p * f - 1.3160182e-1f;
  p = p * f + 1.4201758e-1f;
  p = p * f - 1.6623357e-1f;
  p = p * f + 2.0001227e-1f;
  p = p * f - 2.5000821e-1f;
  p = p * f + 3.3333332e-1f;
  const float tail = f * f * (f * p - 0.5f) + n * 1.4286068e-6f;  // log 2 in two parts, the first exact for every k
  const float log_x = n * 0.693145751953125f + (f + tail);
  return x == x ? log_x : x;
}
KDFAST_INLINE double log_of(double x, double less_one) {
  if (x == 0) return 0.0;
  return std::fabs(less_one) < 0.25 ? std::log1p(less_one) : std::log(x);
}

// tanh: an odd minimax polynomial of degree 11 (relative error 3e-9) for small values, where 1 - e would lose digits.
KDFAST_INLINE float tanh_of(float x) {
  const float a = std::fabs(x), z = x * x;
  const float e = exp_nonpositive(-2.0f * a, ExpScale<float>(1.0));
  float p = -5.9058652e-3f;
  p = p * z + 2.0805382e-2f;
  p = p * z - 5.3786683e-2f;
  p = p * z + 1.3331958e-1f;
  p = p * z - 3.3333299e-1f;
  return a < 0.6f ? x + x * z * p : std::copysign((1.0f - e) / (1.0f + e), x);
}
KDFAST_INLINE double tanh_of(double x) { return std::tanh(x); }

// x' in place of x; a masked class stays masked.
template <class A>
KDFAST_INLINE void cap_row(A* x, int64_t n, double softcap, double logit_scale) {
  const A masked = -std::numeric_limits<A>::infinity(), cap = static_cast<A>(softcap);
  const A scale = static_cast<A>(softcap > 0 ? logit_scale / softcap : logit_scale);
  if (softcap > 0) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) x[j] = x[j] == masked ? masked : cap * tanh_of(x[j] * scale);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) x[j] *= scale;
  }
}

// The gradient in x from the one in x', in place, given x'.
template <class A>
KDFAST_INLINE void uncap_gradient(A* gradient, const A* capped, int64_t n, double softcap, double logit_scale) {
  const A masked = -std::numeric_limits<A>::infinity(), scale = static_cast<A>(logit_scale);
  const A inverse = static_cast<A>(softcap > 0 ? 1 / softcap : 0.0);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const A y = capped[j] == masked ? A(0) : capped[j] * inverse;
    gradient[j] *= scale * (A(1) - y * y);
  }
}

// e = exp((x - base) / tau), its sum over [begin, end). The lanes' sums are added in fp64: of rows that nearly agree the
// logarithm of two such sums is a large part of D's rounding.
template <class A>
KDFAST_INLINE double exponentials_of(const A* x, A* e, int64_t begin, int64_t end, A base, double inverse_tau) {
  const ExpScale<A> scale(inverse_tau);
  Total<A> z;
  int64_t j = begin;
  while (j + kCount<A> <= end) {
    const int64_t whole = (end - j) / kCount<A> * kCount<A>, to = j + (whole < kBlock ? whole : kBlock);
    for (; j < to; j += kCount<A>) {
#pragma omp simd
      for (int i = 0; i < kCount<A>; ++i) e[j + i] = exp_nonpositive(x[j + i] - base, scale);
      add(z.lanes, load_lanes(e + j));
    }
    z.flush();
  }
  for (; j < end; ++j) {
    e[j] = exp_nonpositive(x[j] - base, scale);
    z.before += e[j];
  }
  return z.before;
}

// sum e_v (v - u), both measured from their bases.
template <class A>
KDFAST_INLINE double cross_of(const A* s, const A* t, const A* e_v, int64_t begin, int64_t end, A base_s, A base_t, A per_s,
                              A per_t) {
  double total = 0;
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = from + kBlock < end ? from + kBlock : end;
    A cross = 0;
#pragma omp simd reduction(+ : cross)
    for (int64_t j = from; j < to; ++j) {
      const A ratio = (t[j] - base_t) * per_t - (s[j] - base_s) * per_s;
      cross += e_v[j] == A(0) ? A(0) : e_v[j] * ratio;
    }
    total += cross;
  }
  return total;
}

// ---------------------------------------------------------------- jsd
// The logarithms of q and p over their mixture m. q/m - 1 = beta (q - p)/m: distributions that nearly agree keep the
// digits of their difference. A mixture below the normal numbers counts for nothing.
template <class A>
KDFAST_INLINE A inverse_of_mixture(A m) {
  return m < std::numeric_limits<A>::min() ? A(0) : A(1) / m;
}

struct MixtureSums {
  double f = 0, h = 0, d = 0;  // <q, f>, <p, h>, and D: their sum in terms that are never negative
};
template <class A>
KDFAST_INLINE MixtureSums mixture_sums(const A* e_u, const A* e_v, int64_t n, A inverse_zu, A inverse_zv, A rest, A beta) {
  MixtureSums sums;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    A f = 0, h = 0, d = 0;
#pragma omp simd reduction(+ : f, h, d)
    for (int64_t j = begin; j < end; ++j) {
      const A q = e_u[j] * inverse_zu, p = e_v[j] * inverse_zv, inverse = inverse_of_mixture(rest * q + beta * p);
      const A beyond_q = beta * (q - p), beyond_p = rest * (p - q);  // q - m and p - m, which cancel in D
      const A q_log = q * log_of(q * inverse, beyond_q * inverse), p_log = p * log_of(p * inverse, beyond_p * inverse);
      f += rest * q_log;
      h += beta * p_log;
      d += rest * (q_log - beyond_q) + beta * (p_log - beyond_p);
    }
    sums.f += f, sums.h += h, sums.d += d;
  }
  return sums;
}

// out = g own (w_own log(own / m) - mean); may lie where e_own does.
template <class A>
KDFAST_INLINE void mixture_gradient(const A* e_own, const A* e_other, A* out, int64_t n, A inverse_own, A inverse_other,
                                    A w_own, A w_other, A mean, A g) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const A own = e_own[j] * inverse_own, other = e_other[j] * inverse_other;
    const A inverse = inverse_of_mixture(w_own * own + w_other * other);
    out[j] = g * own * (w_own * log_of(own * inverse, w_other * (own - other) * inverse) - mean);
  }
}

// A divergence gives the rest of the row D, and writes g dD/du and g dD/dv.
template <class A>
struct JsdRow {
  A max_s, max_t;
  double z_u, z_v, d;
  A inverse_zu, inverse_zv, beta, rest, mean_f, mean_h;

  KDFAST_MEMBER void prepare(const Row<A, A>& row, const Options& o) {
    max_s = row_max(row.student, row.n), max_t = row_max(row.teacher, row.n);
    z_u = exponentials_of(row.student, row.e_u, 0, row.n, max_s, 1 / row.tau_s);
    z_v = exponentials_of(row.teacher, row.e_v, 0, row.n, max_t, 1 / row.tau_t);
    inverse_zu = static_cast<A>(1 / z_u), inverse_zv = static_cast<A>(1 / z_v);
    beta = static_cast<A>(o.beta), rest = static_cast<A>(1 - o.beta);
    const MixtureSums sums = mixture_sums(row.e_u, row.e_v, row.n, inverse_zu, inverse_zv, rest, beta);
    d = sums.d, mean_f = static_cast<A>(sums.f), mean_h = static_cast<A>(sums.h);
  }
  KDFAST_MEMBER void by_student(const Row<A, A>& row, A* out, double g) const {
    mixture_gradient(row.e_u, row.e_v, out, row.n, inverse_zu, inverse_zv, rest, beta, mean_f, static_cast<A>(g));
  }
  KDFAST_MEMBER void by_teacher(const Row<A, A>& row, A* out, double g) const {
    mixture_gradient(row.e_v, row.e_u, out, row.n, inverse_zv, inverse_zu, beta, rest, mean_h, static_cast<A>(g));
  }
};

// ---------------------------------------------------------------- dkd
// log(1 / (1 + e^x)) for the logarithms of the pair's probabilities; exact at both ends.
inline double log_sigmoid(double x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }

// e_u and e_v hold the other classes' exponentials, and 0 at the label: 1 - p_t is their sum, never a difference.
template <class A>
struct DkdRow {
  A max_s, max_t;  // of the other classes, or 0 where there is none
  double z_u, z_v, d;
  double by_odds_u, by_odds_v;  // target_weight dT/d odds
  double beta, shift;           // shift: log p^ - log q^ - N = v - u + shift
  A per_s, per_t;

  KDFAST_MEMBER void prepare(const Row<A, A>& row, const Options& o) {
    const A *s = row.student, *t = row.teacher;
    const int64_t n = row.n, label = row.label, starts[2] = {0, label + 1}, ends[2] = {label, n};
    const A nothing = -std::numeric_limits<A>::infinity();
    max_s = max_t = nothing;
    for (int i = 0; i < 2; ++i) {
      const A part_s = row_max(s + starts[i], ends[i] - starts[i]), part_t = row_max(t + starts[i], ends[i] - starts[i]);
      max_s = part_s > max_s ? part_s : max_s, max_t = part_t > max_t ? part_t : max_t;
    }
    max_s = max_s == nothing ? A(0) : max_s, max_t = max_t == nothing ? A(0) : max_t;
    per_s = static_cast<A>(1 / row.tau_s), per_t = static_cast<A>(1 / row.tau_t);
    z_u = z_v = 0;
    double cross = 0;
    for (int i = 0; i < 2; ++i) {
      z_u += exponentials_of(s, row.e_u, starts[i], ends[i], max_s, 1 / row.tau_s);
      z_v += exponentials_of(t, row.e_v, starts[i], ends[i], max_t, 1 / row.tau_t);
      cross += cross_of(s, t, row.e_v, starts[i], ends[i], max_s, max_t, per_s, per_t);
    }
    row.e_u[label] = row.e_v[label] = 0;

    const double odds_u = (static_cast<double>(s[label]) - max_s) / row.tau_s - std::log(z_u);
    const double odds_v = (static_cast<double>(t[label]) - max_t) / row.tau_t - std::log(z_v);
    const double log_p = log_sigmoid(odds_v), log_not_p = log_sigmoid(-odds_v), p = std::exp(log_p), not_p = std::exp(log_not_p);
    const double log_q = log_sigmoid(odds_u), log_not_q = log_sigmoid(-odds_u);
    const double target = (p == 0 ? 0 : p * (log_p - log_q)) + (not_p == 0 ? 0 : not_p * (log_not_p - log_not_q));
    by_odds_u = o.target_weight * (odds_v > 0 ? not_p - std::exp(log_not_q) : std::exp(log_q) - p);
    by_odds_v = p * not_p == 0 ? 0 : o.target_weight * p * not_p * (odds_v - odds_u);
    const double log_ratio = std::log(z_u / z_v);
    const double rest = z_v == 0 ? 0 : z_u == 0 ? std::numeric_limits<double>::infinity() : cross / z_v + log_ratio;
    beta = z_v == 0 ? 0 : o.beta;
    shift = z_v == 0 ? 0 : log_ratio - rest;
    d = o.target_weight * target + o.beta * rest;
  }
  KDFAST_MEMBER void by_student(const Row<A, A>& row, A* out, double g) const {
    const A g_u = static_cast<A>(z_u == 0 ? 0 : g * (beta - by_odds_u) / z_u);
    const A g_v = static_cast<A>(z_v == 0 ? 0 : g * beta / z_v);
    const A *e_u = row.e_u, *e_v = row.e_v;
#pragma omp simd
    for (int64_t j = 0; j < row.n; ++j) out[j] = g_u * e_u[j] - g_v * e_v[j];
    out[row.label] = static_cast<A>(g * by_odds_u);
  }
  KDFAST_MEMBER void by_teacher(const Row<A, A>& row, A* out, double g) const {
    const A g_rest = static_cast<A>(z_v == 0 ? 0 : g * beta / z_v), g_odds = static_cast<A>(z_v == 0 ? 0 : g * by_odds_v / z_v);
    const A base_s = max_s, base_t = max_t, unit_s = per_s, unit_t = per_t, constant = static_cast<A>(shift);
    const A *s = row.student, *t = row.teacher, *e_v = row.e_v;
#pragma omp simd
    for (int64_t j = 0; j < row.n; ++j) {
      const A ratio = (t[j] - base_t) * unit_t - (s[j] - base_s) * unit_s + constant;
      out[j] = e_v[j] == A(0) ? A(0) : e_v[j] * (g_rest * ratio - g_odds);
    }
    out[row.label] = static_cast<A>(g * by_odds_v);
  }
};

// ---------------------------------------------------------------- the row
template <class Divergence, class A>
KDFAST_INLINE void other_row_as(const Row<A, A>& row, const Options& o, A* loss, A* stats) {
  const A *s = row.student, *t = row.teacher;
  const int64_t n = row.n;
  const double tau_s = row.tau_s, tau_t = row.tau_t, keep = 1 - o.alpha;
  const double scale = o.scale == kTau2 ? tau_s * tau_s : o.scale == kProduct ? tau_s * tau_t : 1.0;
  Divergence divergence;
  divergence.prepare(row, o);
  const double d = divergence.d;

  double z_1 = 0;
  A max_1 = 0;
  HardSums hard;
  if (o.alpha > 0) {
    max_1 = row_max(s, n);
    z_1 = exponentials_of(s, row.spare, 0, n, max_1, 1.0);
    hard = hard_target<A, A>(row, o.label_smoothing, max_1, nullptr, 0);
  }

  if (stats != nullptr) {
    const double log_z1 = o.alpha > 0 ? std::log(z_1) : 0.0, ce = hard.mass * log_z1 - hard.weighted;
    *loss = static_cast<A>(row.weight * (keep * scale * d + (o.alpha > 0 ? o.alpha * ce : 0.0)));
    const double values[6] = {static_cast<double>(divergence.max_s), static_cast<double>(divergence.max_t),
                              std::log(divergence.z_u), std::log(divergence.z_v), log_z1, d};
    for (int i = 0; i < 6; ++i) stats[i] = static_cast<A>(values[i]);
    stats[6] = stats[7] = 0;
    if (row.temperature_grad) {
      const double scale_s = o.scale == kTau2 ? 2 * tau_s : o.scale == kProduct ? tau_t : 0.0;
      const double scale_t = o.scale == kProduct ? tau_s : 0.0;
      divergence.by_student(row, row.spare, 1);
      const Unit<A> u(1 / tau_s, divergence.max_s), v(1 / tau_t, divergence.max_t);
      const double a_u = divergence.z_u == 0 ? 0 : kLn2 * centered_dot(row.spare, row.e_u, s, n, true, u);
      divergence.by_teacher(row, row.spare, 1);
      const double b_v = divergence.z_v == 0 ? 0 : kLn2 * centered_dot(row.spare, row.e_v, t, n, true, v);
      stats[6] = static_cast<A>(row.weight * keep * (scale_s * d - scale * a_u / tau_s));
      stats[7] = static_cast<A>(row.weight * keep * (scale_t * d - scale * b_v / tau_t));
    }
  }

  const double g = row.weight * row.coefficient * keep * scale;
  if (row.teacher_grad != nullptr) divergence.by_teacher(row, row.teacher_grad, g / tau_t);
  if (row.student_grad == nullptr) return;
  divergence.by_student(row, row.student_grad, g / tau_s);
  if (o.alpha > 0) {
    const double g_1 = row.weight * row.coefficient * o.alpha;
    const A g_softmax = static_cast<A>(g_1 * hard.mass / z_1);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) row.student_grad[j] += g_softmax * exp_nonpositive(s[j] - max_1, ExpScale<A>(1.0));
    hard_target<A, A>(row, o.label_smoothing, max_1, row.student_grad, static_cast<A>(g_1));
    if (row.target == nullptr) row.student_grad[row.label] -= static_cast<A>(g_1 * (1 - o.label_smoothing));
  }
}

// alpha < 1: without a divergence the row is compute_row's.
template <class A>
KDFAST_INLINE void other_row(const Row<A, A>& row, const Options& o, A* loss, A* stats) {
  if (o.divergence == kJSD) {
    other_row_as<JsdRow<A>>(row, o, loss, stats);
  } else {
    other_row_as<DkdRow<A>>(row, o, loss, stats);
  }
}

}  // namespace kdfast::cpu
