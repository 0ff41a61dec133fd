// One row of kd_kl_topk from its sums: the formulas its CPU and CUDA kernels share. Torch-free, host and device.
//
//   D = sum_listed p (log p - log q) + p_tail (log p_tail - log q_tail),   q = softmax(s / tau)
//
// Listed classes and tail have a maximum and a sum of exponentials each, so that neither is the difference of others
// and neither underflows where the other is far above it. dD/du = q - p at a listed class, and in the tail
// q (1 - p_tail / q_tail) = g exp((s - max_tail) / tau), g = exp((max_tail - max) / tau - log z) - p_tail / z_tail.
// Source: docs/math/kd_kl_topk.md.
#pragma once

#include "online_softmax.h"

namespace kdfast::kd_kl_topk {

// Columns of the statistics; the layout stands in kdfast/reference/kd_kl_topk.py.
enum Stat : int { kMax, kLogZ, kMaxTail, kG, kGradTau, kStats };

template <class A>
struct Part {
  A max, sum;  // of the logits; of exp((s - max) / tau): 0 where there is none
};

template <class A>
struct RowOf {
  A max, log_z, max_tail, g, log_q_tail, p_tail;
};

// What 1 - (the likeliest's p) - (the others' p) leaves: the first difference has all its digits by expm1. Log p being
// rounded to the type Data, p is off by p |log p| eps; what is no more than that in sum is nothing.
template <class Data>
constexpr Data kEpsilon = std::numeric_limits<Data>::epsilon();
template <class Data, class A>
KDFAST_HD A tail_probability(A log_p_likeliest, A others, A entropy) {
  const A left = -::expm1(log_p_likeliest) - others;
  return left > A(kEpsilon<Data>) * entropy ? left : A(0);
}

template <class A>
KDFAST_HD RowOf<A> row_of(const Part<A>& listed, const Part<A>& tail, A per_tau, A p_tail) {
  RowOf<A> row;
  row.max = larger(listed.max, tail.max);
  row.max_tail = tail.max;
  row.p_tail = p_tail;
  const A to_tail = (tail.max - row.max) * per_tau;  // -inf where there is no tail, or the student masks all of it
  row.log_z = ::log(listed.sum * ::exp((listed.max - row.max) * per_tau) + tail.sum * ::exp(to_tail));
  row.log_q_tail = to_tail + ::log(tail.sum) - row.log_z;
  row.g = ::exp(to_tail - row.log_z) - (p_tail == A(0) ? A(0) : p_tail / tail.sum);
  return row;
}

// The tail's term of D.
template <class A>
KDFAST_HD A tail_divergence(const RowOf<A>& row) {
  return row.p_tail == A(0) ? A(0) : row.p_tail * (::log(row.p_tail) - row.log_q_tail);
}

}  // namespace kdfast::kd_kl_topk
