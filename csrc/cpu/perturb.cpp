// perturb on the CPU: all parameters displaced along w = factor v, by a size relative to their own.
//
//   epsilon = radius / sqrt( sum_l (|w_l| / d_l)^2 ),   d_l = max(|theta_l|, 1e-3 sqrt(n)) | sqrt(n) for vectors
//   ahead = theta + epsilon w,  behind = theta - epsilon w,  slope = sum_l <g_l, w_l>
//
// Fused: the scaling by the factor, two norms and a dot in one sweep over the list of tensors, both points in another.
// Memory: 5 passes over the parameters (read theta, g, v; read theta, v) and one or two written: 24 bytes an element in
// fp32, 28 for both. Sums: fp32 in blocks of kBlock elements, those added in fp64 in a fixed order.
// docs/math/perturb.md.
#include <cmath>

#include "../stable.h"
#include "pieces.h"
#include "vec.h"

namespace kdfast::cpu {
namespace {

constexpr double kSmallestRms = 1e-3;  // SMALLEST_RMS in kdfast/reference/perturb.py

struct Sums {
  double ww = 0, tt = 0, gw = 0;  // <w, w>, <theta, theta>, <g, w>
};

template <class A, class T>
KDFAST_INLINE Sums sums_of(const T* theta, const T* g, const T* v, A factor, int64_t n) {
  Sums total;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    A ww = 0, tt = 0, gw = 0;
#pragma omp simd reduction(+ : ww, tt, gw)
    for (int64_t j = begin; j < end; ++j) {
      const A t = widen(theta[j]), w = factor * widen(v[j]);
      ww += w * w;
      tt += t * t;
      gw += widen(g[j]) * w;
    }
    total.ww += ww, total.tt += tt, total.gw += gw;
  }
  return total;
}

template <class A, class T>
KDFAST_INLINE void moved_by(const T* theta, const T* v, A step, T* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(widen(theta[j]) + step * widen(v[j]), &out[j]);
}

// What is compiled once for each kind of vector unit.
#define KDFAST_LOOPS(T, A)                                                                          \
  KDFAST_CLONES Sums sums(const T* theta, const T* g, const T* v, A factor, int64_t n) {            \
    return sums_of<A>(theta, g, v, factor, n);                                                      \
  }                                                                                                 \
  KDFAST_CLONES void move(const T* theta, const T* v, A step, T* out, int64_t n) {                  \
    moved_by<A>(theta, v, step, out, n);                                                            \
  }
KDFAST_LOOPS(float, float)
KDFAST_LOOPS(double, double)
KDFAST_LOOPS(BFloat16Bits, float)
KDFAST_LOOPS(HalfBits, float)
#undef KDFAST_LOOPS

using Tensors = std::vector<Tensor>;

template <class T, class A>
void run(const Tensors& theta, const Tensors& g, const Tensors& v, const std::vector<double>& factors, double radius,
         const Tensors& ahead, const Tensors& behind, A* summary) {
  const std::vector<Piece> pieces = cut(theta);
  std::vector<Sums> partial(pieces.size());
  for_each_piece(pieces, [&](int64_t i, const Piece& p) {
    partial[i] = sums(at<T>(theta, p), at<T>(g, p), at<T>(v, p), static_cast<A>(factors[p.tensor]), p.count);
  });
  double relative = 0, slope = 0;
  for (size_t i = 0; i < pieces.size();) {
    const size_t tensor = pieces[i].tensor;
    Sums sum;
    for (; i < pieces.size() && pieces[i].tensor == tensor; ++i) {
      sum.ww += partial[i].ww, sum.tt += partial[i].tt, sum.gw += partial[i].gw;
    }
    const double n = static_cast<double>(theta[tensor].numel());
    const double size = theta[tensor].dim() < 2 ? 1.0 : std::max(std::sqrt(sum.tt / n), kSmallestRms);
    relative += sum.ww / n / (size * size);
    slope += sum.gw;
  }
  A epsilon = static_cast<A>(radius / std::sqrt(relative));
  if (!(relative > 0) || !std::isfinite(relative) || !std::isfinite(epsilon)) epsilon = 0;
  summary[0] = epsilon, summary[1] = static_cast<A>(slope);
  for_each_piece(pieces, [&](int64_t, const Piece& p) {
    const T *from = at<T>(theta, p), *along = at<T>(v, p);
    if (epsilon == 0) {  // also where v is not finite
      std::copy_n(from, p.count, at<T>(ahead, p));
      if (!behind.empty()) std::copy_n(from, p.count, at<T>(behind, p));
      return;
    }
    const A step = epsilon * static_cast<A>(factors[p.tensor]);
    move(from, along, step, at<T>(ahead, p), p.count);
    if (!behind.empty()) move(from, along, -step, at<T>(behind, p), p.count);
  });
}

std::tuple<Tensors, Tensors, Tensor> perturb(Tensors theta, Tensors g, Tensors v, std::vector<double> factors,
                                             double radius, bool both) {
  STD_TORCH_CHECK(!theta.empty() && factors.size() == theta.size(), "perturb: needs a tensor, and a factor for each");
  check_lists(theta, g);
  check_lists(theta, v);
  Tensors ahead = empty_like(theta), behind = both ? empty_like(theta) : Tensors{};
  const ScalarType type = theta[0].scalar_type();
  Tensor summary = empty(theta[0], {2}, accumulate_type(type));
  void* out = summary.data_ptr();
  switch (type) {
    case ScalarType::Float:
      run<float>(theta, g, v, factors, radius, ahead, behind, static_cast<float*>(out));
      break;
    case ScalarType::Double:
      run<double>(theta, g, v, factors, radius, ahead, behind, static_cast<double*>(out));
      break;
    case ScalarType::BFloat16:
      run<BFloat16Bits>(theta, g, v, factors, radius, ahead, behind, static_cast<float*>(out));
      break;
    case ScalarType::Half:
      run<HalfBits>(theta, g, v, factors, radius, ahead, behind, static_cast<float*>(out));
      break;
    default:
      STD_TORCH_CHECK(false, "perturb: parameters must be fp64, fp32, bf16 or fp16");
  }
  return {ahead, behind, summary};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("perturb", TORCH_BOX(&kdfast::cpu::perturb)); }
