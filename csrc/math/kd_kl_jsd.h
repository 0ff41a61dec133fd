// The generalised Jensen-Shannon divergence of two rows of logits. Torch-free, host and device.
//
//   D = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q,   p teacher, q student
//   f = log(q / m),  dD/du = (1 - beta) q (f - <q, f>)       h = log(p / m),  dD/dv = beta p (h - <p, h>)
//
// m wants p and q normalised, so a row is swept twice: maxima and normalisers, then JsdSums. <q, f> and
// <p, h> are the two halves of D, and all the gradients need beside the normalisers. Logarithms are taken of
// the ratios, at most 1 / beta and 1 / (1 - beta), and 1 to a rounding where p = q.
// Memory for one row of C classes of b bytes: forward reads 2 C b twice, the second time mostly from cache.
// Source: Agarwal et al. 2023, "On-policy distillation of language models" (arXiv:2306.13649), eq. 1.
#pragma once

#include "kd_kl.h"

namespace kdfast::kd_kl {

// A probability below this adds nothing to a sum, and above it no share of m is subnormal.
template <class A>
constexpr A kTiny = sizeof(A) == 4 ? A(1e-19) : A(1e-150);

template <class A>
struct JsdGradient {
  Units<A> unit;  // from: the teacher, to: the student
  A max_from, max_to, log2_z_from, log2_z_to;
  A beta;
  A of_p, of_q;  // <p, log2(p / m)>, <q, log2(q / m)>

  struct Element {
    A log2_p, log2_q, p, q, ratio_p, ratio_q;  // log2(p / m), log2(q / m)
  };
  KDFAST_HD Element at(A x, A y) const {  // a logit of the teacher, of the student
    const A log2_p = (x - max_from) * unit.k_from - log2_z_from;
    const A log2_q = (y - max_to) * unit.k_to - log2_z_to;
    const A p = exp2_of(log2_p), q = exp2_of(log2_q);
    // From the larger share, so that nothing cancels and p = q gives exactly that.
    const A m = beta < A(0.5) ? q + beta * (p - q) : p + (1 - beta) * (q - p);
    const A per_m = reciprocal_of(m);
    return {log2_p, log2_q, p, q, p < kTiny<A> ? A(0) : log2_of(p * per_m),
            q < kTiny<A> ? A(0) : log2_of(q * per_m)};
  }
  KDFAST_HD A by_to(const Element& e) const { return A(kLn2) * (1 - beta) * e.q * (e.ratio_q - of_q); }
  KDFAST_HD A by_from(const Element& e) const { return A(kLn2) * beta * e.p * (e.ratio_p - of_p); }
  KDFAST_HD A divergence() const { return A(kLn2) * (beta * of_p + (1 - beta) * of_q); }
};

// D's halves, and what the temperatures' inner products are made of: as in TemperatureSums, u is measured
// by log q and v by log p.
template <class A>
struct JsdSums {
  A of_p = 0, of_q = 0;        // sums of p log2(p / m), q log2(q / m)
  A self_p = 0, self_q = 0;    // p log2 p, q log2 q
  A cross_p = 0, cross_q = 0;  // p log2(p / m) log2 p, q log2(q / m) log2 q

  KDFAST_HD void add(const JsdGradient<A>& gradient, A x, A y, bool temperatures) {
    const auto e = gradient.at(x, y);
    of_p += e.p * e.ratio_p;
    of_q += e.q * e.ratio_q;
    if (temperatures) {
      const A p = e.p < kTiny<A> ? A(0) : e.p * e.log2_p, q = e.q < kTiny<A> ? A(0) : e.q * e.log2_q;
      self_p += p, self_q += q;
      cross_p += p * e.ratio_p, cross_q += q * e.ratio_q;
    }
  }
  // <dD/dv, v> and <dD/du, u>, divided by log 2.
  KDFAST_HD TemperatureSums<A> inner(A beta) const {
    return {A(kLn2) * beta * (cross_p - of_p * self_p), A(kLn2) * (1 - beta) * (cross_q - of_q * self_q)};
  }
};

}  // namespace kdfast::kd_kl
