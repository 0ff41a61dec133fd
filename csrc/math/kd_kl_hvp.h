// Second order of kd_kl, row by row: the formulas its CPU and CUDA kernels share. Torch-free, host and device.
//
//   D = sum p (k log p - log q),  p of the logits that weigh (`from`), q of the others (`to`), r = k log p - log q
//   a = dD/d to = q - p           b = dD/d from = p (r - D)
//
// A dot is the derivative along the given direction, J(p) x = p (x - <p, x>) the only primitive:
//
//   a. = J(q) to. - J(p) from.    b. = p [ from_ (r - D) + k from_ - to_ - D. ],  x_ = x. less its mean
//   D. = <a, to.> + <b, from.>
//
// With c = tau_s^2 | tau_s tau_t | 1 and g either a or b, of logits z over tau:
//
//   h_logits = x g + y g.                     x = f (c. - c w_tau / tau) / tau,   y = f c / tau
//   h_tau    = f (c_tau. D + c_tau D.) - x <g, z> - y (<g., z> + <g, z.>)
//
// f is the row's factor. a, b, a., b. sum to zero, so z and z. may be measured from anywhere.
// Memory for one row of C classes of b bytes: reads s, t and the directions given (C b each), writes C b for each product.
// Source: docs/math/kd_kl_hvp.md.
#pragma once

#include "online_softmax.h"

namespace kdfast::kd_kl_hvp {

template <class A>
struct Element {
  A a, a_dot;  // of `to`
  A b, b_dot;  // of `from`
};

// excess = r - D, and 0 where p is; from_dot and to_dot without their means.
template <class A>
KDFAST_HD Element<A> element(A p, A q, A excess, A from_dot, A to_dot, A k, A d_dot) {
  const A p_dot = p * from_dot;
  return {q - p, q * to_dot - p_dot, p * excess, p_dot * excess + p * (k * from_dot - to_dot - d_dot)};
}

// c, its derivatives in the temperatures, and the change of all three along (w_tau_s, w_tau_t).
template <class A>
struct Scale {
  A value, by_s, by_t, value_dot, by_s_dot, by_t_dot;
};
template <class A>
KDFAST_HD Scale<A> scale_of(int scale, A tau_s, A tau_t, A w_tau_s, A w_tau_t) {
  if (scale == 0) return {tau_s * tau_s, 2 * tau_s, A(0), 2 * tau_s * w_tau_s, 2 * w_tau_s, A(0)};
  if (scale == 1) return {tau_s * tau_t, tau_t, tau_s, tau_t * w_tau_s + tau_s * w_tau_t, w_tau_t, w_tau_s};
  return {A(1), A(0), A(0), A(0), A(0), A(0)};
}

// x and y above.
template <class A>
struct Factors {
  A of_gradient, of_change;
};
template <class A>
KDFAST_HD Factors<A> factors(const Scale<A>& c, A factor, A tau, A w_tau) {
  return {factor * (c.value_dot - c.value * w_tau / tau) / tau, factor * c.value / tau};
}

}  // namespace kdfast::kd_kl_hvp
