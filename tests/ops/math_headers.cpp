// The row formulas of csrc/math on a CPU, the way a GPU uses them: a row dealt out in chunks to several
// states, which are then merged. Reads rows from stdin, prints what they give. test_math_headers.py compiles
// it as plain C++17.
#include <cstdio>
#include <vector>

#include "csrc/math/kd_kl.h"

using namespace kdfast;
using namespace kdfast::kd_kl;

constexpr int kChunk = 4, kStates = 3;

template <class A>
void row(int classes, int divergence, int scale, double tau_s, double tau_t, double alpha, double smoothing,
         const std::vector<double>& s, const std::vector<double>& t, const std::vector<double>& w) {
  const Options<A> o = make_options<A>(tau_s, tau_t, alpha, smoothing, -100, divergence, scale);
  const auto &from = o.reverse ? s : t, &to = o.reverse ? t : s;
  const A k_s = A(kLog2e) / A(tau_s), k_t = A(kLog2e) / A(tau_t);
  const Units<A> unit{o.reverse ? k_s : k_t, o.reverse ? k_t : k_s, o.entropy};

  DivergenceSums<A> sums[kStates];
  HardSums<A> hard[kStates];
  for (int begin = 0, turn = 0; begin < classes; begin += kChunk, ++turn) {
    A x[kChunk], y[kChunk], student[kChunk], target[kChunk];
    for (int i = 0; i < kChunk; ++i) {
      const int j = begin + i;
      x[i] = j < classes ? A(from[j]) : -kInfinity<A>;
      y[i] = j < classes ? A(to[j]) : -kInfinity<A>;
      student[i] = j < classes ? A(s[j]) : -kInfinity<A>;
      target[i] = j < classes ? A(w[j]) : A(0);
    }
    sums[turn % kStates].add(x, y, unit);
    hard[turn % kStates].add(student, target);
  }
  DivergenceSums<A>& all = sums[0];
  HardSums<A>& label = hard[0];
  for (int i = 1; i < kStates; ++i) {
    const A from_max = larger(all.from.max, sums[i].from.max), to_max = larger(all.to.max, sums[i].to.max);
    all.raise(from_max, to_max, unit), sums[i].raise(from_max, to_max, unit);
    all.from.sum += sums[i].from.sum, all.to.sum += sums[i].to.sum, all.cross += sums[i].cross;
    const A max = larger(label.softmax.max, hard[i].softmax.max);
    label.raise(max), hard[i].raise(max);
    label.softmax.sum += hard[i].softmax.sum;
    label.finite += hard[i].finite, label.finite_dot += hard[i].finite_dot;
    label.mass += hard[i].mass, label.dot += hard[i].dot;
  }

  const A divergence_value = all.divergence(o.entropy);
  const ScaleFactor<A> c = scale_factor(scale, A(tau_s), A(tau_t));
  const A loss = o.keep * c.value * divergence_value + (o.hard ? o.alpha * label.cross_entropy(o) : A(0));
  const DivergenceGradient<A> soft{unit, all.from.max, all.to.max, log2_of(all.from.sum), log2_of(all.to.sum),
                                   divergence_value};
  const A mass = o.keep_hard * label.mass + o.smoothing, spread = o.smoothing / label.finite;
  const HardGradient<A> by_label{label.softmax.max, log2_of(label.softmax.sum), mass, spread, o.keep_hard};
  TemperatureSums<A> inner;
  std::vector<A> ds(classes), dt(classes);
  for (int j = 0; j < classes; ++j) {
    const auto e = soft.at(A(from[j]), A(to[j]));
    const A by_from = soft.by_from(e), by_to = soft.by_to(e);
    ds[j] = o.keep * c.value / A(tau_s) * (o.reverse ? by_from : by_to);
    if (o.hard) ds[j] += o.alpha * by_label.at(A(s[j]), A(w[j]));
    dt[j] = o.keep * c.value / A(tau_t) * (o.reverse ? by_to : by_from);
    inner.add(soft, A(from[j]), A(to[j]));
  }
  const A inner_s = A(kLn2) * (o.reverse ? inner.from : inner.to);
  const A inner_t = A(kLn2) * (o.reverse ? inner.to : inner.from);
  const A by_tau_s = o.keep * (c.by_tau_s * divergence_value - c.value * inner_s / A(tau_s));
  const A by_tau_t = o.keep * (c.by_tau_t * divergence_value - c.value * inner_t / A(tau_t));
  std::printf("%.17g %.17g %.17g", double(loss), double(by_tau_s), double(by_tau_t));
  for (A g : ds) std::printf(" %.17g", double(g));
  for (A g : dt) std::printf(" %.17g", double(g));
  std::printf("\n");
}

int main() {
  int fp64, classes, divergence, scale;
  double tau_s, tau_t, alpha, smoothing;
  while (std::scanf("%d %d %d %d %lf %lf %lf %lf", &fp64, &classes, &divergence, &scale, &tau_s, &tau_t,
                    &alpha, &smoothing) == 8) {
    std::vector<double> rows[3];
    for (auto& r : rows) {
      r.resize(classes);
      for (double& x : r)
        if (std::scanf("%lf", &x) != 1) return 1;
    }
    (fp64 ? row<double> : row<float>)(classes, divergence, scale, tau_s, tau_t, alpha, smoothing, rows[0],
                                      rows[1], rows[2]);
  }
  return 0;
}
