// Decoupled distillation of two rows of logits and a label. Torch-free, host and device.
//
//   D = w TCKD + beta NCKD
//   TCKD = p_t log(p_t / q_t) + (1 - p_t) log((1 - p_t) / (1 - q_t))        t: the label
//   NCKD = KL(p^ || q^),   p^, q^: softmax of v, u over the classes other than t
//
// The others' sums never hold the label (its logit is put in as -inf: DivergenceSums), so nothing is taken
// from 1, and D keeps its digits where 1 - p_t underflows. With odds against the label
//   a = log sum_{j != t} exp(u_j) - u_t        q_t = 1 / (1 + e^a),  - log q_t = softplus(a)
// and the same of v (a_v), TCKD depends on the row through the two odds only; da/du = q^ - e_t:
//   dTCKD/da_u = p_t - q_t         dTCKD/da_v = p_t (1 - p_t) (a_v - a_u)
//   dD/du = w (p_t - q_t) (q^ - e_t) + beta (q^ - p^)
//   dD/dv = w p_t (1 - p_t) (a_v - a_u) (p^ - e_t) + beta p^ (log p^ - log q^ - NCKD)
// All in units of log 2. Memory: as for a KL, and two logits more a row.
// Source: Zhao et al. 2022, "Decoupled knowledge distillation" (arXiv:2203.08679), eq. 6-7.
#pragma once

#include "kd_kl.h"

namespace kdfast::kd_kl {

template <class A>
KDFAST_HD A softplus2(A a) {  // log2(1 + 2^a)
  return larger(a, A(0)) + A(kLog2e) * log1p_of(exp2_of(a < A(0) ? a : -a));
}
template <class A>
KDFAST_HD A sigmoid2(A a) {  // 2^a / (1 + 2^a)
  const A e = exp2_of(a < A(0) ? a : -a);
  return (a < A(0) ? e : A(1)) / (A(1) + e);
}

// A label against all other classes.
template <class A>
struct Odds {
  A of_p, of_q;  // log2 of the odds against: a_v, a_u

  KDFAST_HD A divergence() const {  // TCKD
    const A p = sigmoid2(-of_p), rest = sigmoid2(of_p);
    const A hit = p == A(0) ? A(0) : p * (softplus2(of_q) - softplus2(of_p));
    const A miss = rest == A(0) ? A(0) : rest * (softplus2(-of_q) - softplus2(-of_p));
    return A(kLn2) * (hit + miss);
  }
  KDFAST_HD A by_q() const {  // p_t - q_t, from the smaller sides
    return of_p < A(0) ? sigmoid2(of_q) - sigmoid2(of_p) : sigmoid2(-of_p) - sigmoid2(-of_q);
  }
  KDFAST_HD A by_p() const {
    const A spread = sigmoid2(of_p) * sigmoid2(-of_p);
    return spread == A(0) ? A(0) : A(kLn2) * spread * (of_p - of_q);
  }
};

template <class A>
struct DkdGradient {
  using Element = typename DivergenceGradient<A>::Element;
  DivergenceGradient<A> others;  // from: the teacher; its D is NCKD
  Odds<A> odds;
  A beta, by_odds_p, by_odds_q;  // w dTCKD/da_v, w dTCKD/da_u

  KDFAST_HD Element at(A x, A y) const { return others.at(x, y); }  // -inf for the label
  KDFAST_HD A by_to(const Element& e) const { return by_odds_q * e.q + beta * others.by_to(e); }
  KDFAST_HD A by_from(const Element& e) const { return by_odds_p * e.p + beta * others.by_from(e); }
  KDFAST_HD A divergence(const Options<A>& o) const {
    return o.target_weight * odds.divergence() + beta * others.divergence;
  }
};

// From the others' maxima, log2 z and D, and the label's logits. Without any other class left in a row its
// maximum is -inf and z 0, the odds are 0 and p^ or q^ is 0 everywhere; without any in the teacher there is no
// NCKD, and no gradient of it.
template <class A>
KDFAST_HD DkdGradient<A> dkd_gradient(const Options<A>& o, const Units<A>& unit, A max_from, A max_to,
                                      A log2_z_from, A log2_z_to, A nckd, A label_from, A label_to) {
  const A base_from = base_of(max_from), base_to = base_of(max_to);
  const Odds<A> odds{log2_z_from - (label_from - base_from) * unit.k_from,
                     log2_z_to - (label_to - base_to) * unit.k_to};
  const A empty = -kInfinity<A>;
  return {{unit, base_from, base_to, log2_z_from == empty ? A(0) : log2_z_from,
           log2_z_to == empty ? A(0) : log2_z_to, nckd},
          odds, log2_z_from == empty ? A(0) : o.beta, o.target_weight * odds.by_p(), o.target_weight * odds.by_q()};
}

// NCKD: 0 where the teacher has no other class, and infinite where the student alone has none.
template <class A>
KDFAST_HD A nckd_of(const DivergenceSums<A>& others) {
  if (others.from.sum == A(0)) return A(0);
  return others.to.sum == A(0) ? kInfinity<A> : others.divergence(A(1));
}

template <class A>
struct DkdSums {
  TemperatureSums<A> others;

  KDFAST_HD void add(const DkdGradient<A>& gradient, A x, A y) {
    const auto e = gradient.at(x, y);
    others.from += e.p == A(0) ? A(0) : gradient.by_from(e) * e.log2_p;
    others.to += e.log2_q == -kInfinity<A> ? A(0) : gradient.by_to(e) * e.log2_q;
  }
  // With u measured by log q^, the label's own is -a_u.
  KDFAST_HD TemperatureSums<A> inner(const DkdGradient<A>& g) const {
    return {others.from + (g.by_odds_p == A(0) ? A(0) : g.by_odds_p * g.odds.of_p),
            others.to + (g.by_odds_q == A(0) ? A(0) : g.by_odds_q * g.odds.of_q)};
  }
};

}  // namespace kdfast::kd_kl
