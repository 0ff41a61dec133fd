// kd_kl, row by row: the formulas of its CUDA kernels. Torch-free, host and device; A is float or double.
//
//   loss = w [ (1 - alpha) c D + alpha CE ],   u = s / tau_s, q = softmax(u),   v = t / tau_t, p = softmax(v)
//   D = sum p (k log p - log q)    k = 1: forward_kl, k = 0: soft_ce; reverse_kl changes the roles of p and q
//   c = tau_s^2 | tau_s tau_t | 1          (jsd: kd_kl_jsd.h, dkd: kd_kl_dkd.h)
//   s, t: the logits x as they are, or cap tanh(scale x / cap)
//
// The distribution that weighs is called `from`, the other one `to`. With r = k log p - log q:
//
//   dD / d to logits = q - p       dD / d from logits = p (r - D)       dCE / ds = mass softmax(s) - target
//
// D and CE come from sums that one sweep over the row can keep (DivergenceSums, HardSums); given the row's
// statistics the gradients are elementwise (DivergenceGradient, HardGradient). Distances from the row's
// maximum are summed, never raw logits, so a constant added to a row costs no digits. All in units of log 2.
//
// Memory for one row of C classes of b bytes: forward reads 2 C b and writes 9 numbers; backward reads 2 C b
// and writes C b (2 C b with the teacher's gradient): 5 passes over [rows, classes] in all.
// Source: Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), eq. 1-4; derivatives in docs/math/kd_kl.md.
#pragma once

#include <cstdint>

#include "online_softmax.h"

namespace kdfast::kd_kl {

enum Divergence : int { kForwardKL = 0, kReverseKL = 1, kSoftCE = 2, kJSD = 3, kDKD = 4 };
enum Scale : int { kTau2 = 0, kProduct = 1, kNone = 2 };

// Columns of the statistics [rows, kStats]. What the loss does not need is 0, and so is an ignored row:
// kLogZ1 is for alpha > 0; kMaxT, kLogZU, kLogZV and kD for alpha < 1; the temperatures' gradients when
// asked for. jsd keeps KL(p || m) in kD and KL(q || m) in kLogZ1; dkd keeps the maxima and normalisers of
// the classes other than the label, and their D.
enum Stat : int { kMaxS, kMaxT, kLogZU, kLogZV, kLogZ1, kD, kGradTauS, kGradTauT, kStats };

// What becomes of a logit before anything else: cap tanh(scale x / cap), or scale x where cap is 0.
template <class A>
struct LogitMap {
  A scale, cap, scale_per_cap, per_cap;  // the last two 0 without a cap
  bool identity;

  KDFAST_HD A at(A x) const {
    if (x == -kInfinity<A>) return x;  // masked stays masked
    return cap > A(0) ? cap * tanh_of(x * scale_per_cap) : scale * x;
  }
  KDFAST_HD A slope(A mapped) const {  // d mapped / dx
    const A share = mapped * per_cap;
    return mapped == -kInfinity<A> ? A(0) : scale * (A(1) - share * share);
  }
};

template <class A>
struct Options {
  A tau_s, tau_t;             // where the temperature is no tensor
  A keep, alpha;              // 1 - alpha, alpha
  A keep_hard, smoothing;     // 1 - label_smoothing, label_smoothing
  A entropy;                  // k: 1, or 0 for soft_ce
  A beta, target_weight;      // of jsd and dkd
  LogitMap<A> map;
  bool soft, hard, reverse;   // is there a divergence; a hard label; does the student weigh
  int scale;
  int64_t ignore_index;
};

template <class A>
Options<A> make_options(double tau_s, double tau_t, double alpha, double label_smoothing,
                        int64_t ignore_index, int divergence, int scale, double beta, double target_weight,
                        double softcap, double logit_scale) {
  const bool soft = alpha < 1, capped = softcap > 0;
  const LogitMap<A> map{A(logit_scale), A(softcap), A(capped ? logit_scale / softcap : 0),
                        A(capped ? 1 / softcap : 0), !capped && logit_scale == 1};
  return {A(tau_s), A(tau_t), A(1 - alpha), A(alpha), A(1 - label_smoothing), A(label_smoothing),
          A(divergence == kSoftCE ? 0 : 1), A(beta), A(target_weight), map, soft, alpha > 0,
          soft && divergence == kReverseKL, scale, ignore_index};
}

// c and its derivatives in the two temperatures.
template <class A>
struct ScaleFactor {
  A value, by_tau_s, by_tau_t;
};
template <class A>
KDFAST_HD ScaleFactor<A> scale_factor(int scale, A tau_s, A tau_t) {
  if (scale == kTau2) return {tau_s * tau_s, 2 * tau_s, A(0)};
  if (scale == kProduct) return {tau_s * tau_t, tau_t, tau_s};
  return {A(1), A(0), A(0)};
}

// What an element of D needs to know of its row.
template <class A>
struct Units {
  A k_from, k_to;  // log2(e) / temperature
  A entropy;       // k
};

template <class A>
struct DivergenceSums {
  OnlineSoftmax<A> from, to;
  A cross = 0;  // sum of e (k y_from - y_to), e = exp2(y_from), y = distances from the maxima

  KDFAST_HD void raise(A from_max, A to_max, const Units<A>& unit) {
    const A weight = from.sum;
    const auto f = from.raise(from_max, unit.k_from), t = to.raise(to_max, unit.k_to);
    const A moved = f.factor * (cross - weight * (unit.entropy * f.distance - t.distance));
    cross = f.factor == A(0) ? A(0) : moved;  // not 0 * inf where a masked class had been seen
  }

  template <int N>
  KDFAST_HD void add(const A (&x)[N], const A (&y)[N], const Units<A>& unit) {  // N logits of from, of to
    A from_max = from.max, to_max = to.max;
    KDFAST_UNROLL
    for (int i = 0; i < N; ++i) from_max = larger(from_max, x[i]), to_max = larger(to_max, y[i]);
    if (from_max > from.max || to_max > to.max) raise(from_max, to_max, unit);
    const A from_base = base_of(from.max), to_base = base_of(to.max);
    KDFAST_UNROLL
    for (int i = 0; i < N; ++i) {
      const A y_from = rounded_product(x[i] - from_base, unit.k_from);
      const A y_to = rounded_product(y[i] - to_base, unit.k_to);
      const A e = exp2_of(y_from);
      from.sum += e;
      to.sum += exp2_of(y_to);
      cross += e == A(0) ? A(0) : e * (unit.entropy * y_from - y_to);  // 0 log 0 = 0
    }
  }

  // One logarithm of a ratio rather than two logarithms: exact 0 for equal distributions.
  KDFAST_HD A divergence(A entropy) const {
    return A(kLn2) * (cross / from.sum + log2_of(to.sum / (entropy == A(0) ? A(1) : from.sum)));
  }
};

template <class A>
struct HardSums {
  OnlineSoftmax<A> softmax;  // of the student at temperature 1
  A finite = 0, finite_dot = 0;  // number of classes not masked, and the sum of their y
  A mass = 0, dot = 0;           // sum of the target, and of target * y

  KDFAST_HD void raise(A max) {
    const A distance = softmax.raise(max, A(kLog2e)).distance;
    finite_dot -= finite * distance;
    dot -= mass * distance;
  }

  template <int N>
  KDFAST_HD void add(const A (&s)[N], const A (&target)[N]) {  // N logits; N probabilities, 0 for labels
    A max = softmax.max;
    KDFAST_UNROLL
    for (int i = 0; i < N; ++i) max = larger(max, s[i]);
    if (max > softmax.max) raise(max);
    const A base = base_of(softmax.max);
    KDFAST_UNROLL
    for (int i = 0; i < N; ++i) {
      const A y = (s[i] - base) * A(kLog2e);
      softmax.sum += exp2_of(y);
      const bool masked = s[i] == -kInfinity<A>;
      finite += masked ? A(0) : A(1);
      finite_dot += masked ? A(0) : y;
      mass += target[i];
      dot += target[i] == A(0) ? A(0) : target[i] * y;
    }
  }

  // CE = sum of target' (log z - y), target' = keep_hard target + smoothing / finite.
  KDFAST_HD A cross_entropy(const Options<A>& o) const {
    const A log_z = log2_of(softmax.sum);
    const A hard = o.keep_hard > A(0) ? o.keep_hard * (mass * log_z - dot) : A(0);
    const A spread = o.smoothing > A(0) ? o.smoothing * (log_z - finite_dot / finite) : A(0);
    return A(kLn2) * (hard + spread);
  }
};

template <class A>
struct DivergenceGradient {
  Units<A> unit;
  A max_from, max_to, log2_z_from, log2_z_to;
  A divergence;  // D

  struct Element {
    A log2_p, log2_q, p, q;
  };
  KDFAST_HD Element at(A x, A y) const {  // a logit of from, of to
    const A log2_p = (x - max_from) * unit.k_from - log2_z_from;
    const A log2_q = (y - max_to) * unit.k_to - log2_z_to;
    return {log2_p, log2_q, exp2_of(log2_p), exp2_of(log2_q)};
  }
  KDFAST_HD A by_to(const Element& e) const { return e.q - e.p; }
  KDFAST_HD A by_from(const Element& e) const {
    const A r = A(kLn2) * (unit.entropy * e.log2_p - e.log2_q);
    return e.p == A(0) ? A(0) : e.p * (r - divergence);
  }
};

// The temperatures' inner products <dD/du, u> and <dD/dv, v>. Both gradients sum to zero over the row, so u
// and v may be measured from anywhere: log q and log p are small where u and v may not be.
template <class A>
struct TemperatureSums {
  A from = 0, to = 0;

  KDFAST_HD void add(const DivergenceGradient<A>& gradient, A x, A y) {
    const auto e = gradient.at(x, y);
    from += e.p == A(0) ? A(0) : gradient.by_from(e) * e.log2_p;
    to += e.log2_q == -kInfinity<A> ? A(0) : gradient.by_to(e) * e.log2_q;
  }
};

template <class A>
struct HardGradient {
  A max, log2_z;     // of the student at temperature 1
  A mass, spread;    // sum of target'; smoothing / number of classes not masked
  A keep_hard;

  KDFAST_HD A at(A s, A target) const {
    const A probability = exp2_of((s - max) * A(kLog2e) - log2_z);
    return mass * probability - keep_hard * target - (s == -kInfinity<A> ? A(0) : spread);
  }
};

}  // namespace kdfast::kd_kl
