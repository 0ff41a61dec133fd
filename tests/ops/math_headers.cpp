// The row formulas of csrc/math on a CPU, the way a GPU uses them: a row dealt out in chunks to several
// states, which are then merged. Reads rows from stdin, prints what they give. test_math_headers.py compiles
// it as plain C++17.
#include <cstdio>
#include <vector>

#include "csrc/math/kd_kl_dkd.h"
#include "csrc/math/kd_kl_jsd.h"

using namespace kdfast;
using namespace kdfast::kd_kl;

constexpr int kChunk = 4, kStates = 3;

struct Case {
  int classes, divergence, scale, label;
  double tau_s, tau_t, alpha, smoothing, beta, target_weight, softcap, logit_scale;
};

template <class A>
void row(const Case& c, const std::vector<double>& s, const std::vector<double>& t, const std::vector<double>& w) {
  const Options<A> o = make_options<A>(c.tau_s, c.tau_t, c.alpha, c.smoothing, -100, c.divergence, c.scale, c.beta,
                                       c.target_weight, c.softcap, c.logit_scale);
  const bool dkd = c.divergence == kDKD, jsd = c.divergence == kJSD;
  std::vector<A> mapped_s(c.classes), mapped_t(c.classes);
  for (int j = 0; j < c.classes; ++j) mapped_s[j] = o.map.at(A(s[j])), mapped_t[j] = o.map.at(A(t[j]));
  const auto &from = o.reverse ? mapped_s : mapped_t, &to = o.reverse ? mapped_t : mapped_s;
  // dkd's sums never see the label.
  const auto of_others = [&](A x, int j) { return dkd && j == c.label ? -kInfinity<A> : x; };
  const A k_s = A(kLog2e) / A(c.tau_s), k_t = A(kLog2e) / A(c.tau_t);
  const Units<A> unit{o.reverse ? k_s : k_t, o.reverse ? k_t : k_s, o.entropy};

  DivergenceSums<A> sums[kStates];
  HardSums<A> hard[kStates];
  for (int begin = 0, turn = 0; begin < c.classes; begin += kChunk, ++turn) {
    A x[kChunk], y[kChunk], student[kChunk], target[kChunk];
    for (int i = 0; i < kChunk; ++i) {
      const int j = begin + i;
      x[i] = j < c.classes ? of_others(from[j], j) : -kInfinity<A>;
      y[i] = j < c.classes ? of_others(to[j], j) : -kInfinity<A>;
      student[i] = j < c.classes ? mapped_s[j] : -kInfinity<A>;
      target[i] = j < c.classes ? A(w[j]) : A(0);
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

  const A log2_z_from = log2_of(all.from.sum), log2_z_to = log2_of(all.to.sum);
  A divergence_value;
  TemperatureSums<A> inner;
  std::vector<A> by_from(c.classes), by_to(c.classes);
  if (jsd) {
    JsdGradient<A> soft{unit, all.from.max, all.to.max, log2_z_from, log2_z_to, o.beta, A(0), A(0)};
    JsdSums<A> second;
    for (int j = 0; j < c.classes; ++j) second.add(soft, from[j], to[j], true);
    soft.of_p = second.of_p, soft.of_q = second.of_q;
    divergence_value = soft.divergence(), inner = second.inner(o.beta);
    for (int j = 0; j < c.classes; ++j) {
      const auto e = soft.at(from[j], to[j]);
      by_from[j] = soft.by_from(e), by_to[j] = soft.by_to(e);
    }
  } else if (dkd) {
    const auto soft = dkd_gradient(o, unit, all.from.max, all.to.max, log2_z_from, log2_z_to, nckd_of(all),
                                   from[c.label], to[c.label]);
    DkdSums<A> second;
    for (int j = 0; j < c.classes; ++j) {
      const auto e = soft.at(of_others(from[j], j), of_others(to[j], j));
      by_from[j] = j == c.label ? -soft.by_odds_p : soft.by_from(e);
      by_to[j] = j == c.label ? -soft.by_odds_q : soft.by_to(e);
      second.add(soft, of_others(from[j], j), of_others(to[j], j));
    }
    divergence_value = soft.divergence(o), inner = second.inner(soft);
  } else {
    divergence_value = all.divergence(o.entropy);
    const DivergenceGradient<A> soft{unit,        all.from.max, all.to.max,
                                     log2_z_from, log2_z_to,    divergence_value};
    for (int j = 0; j < c.classes; ++j) {
      const auto e = soft.at(from[j], to[j]);
      by_from[j] = soft.by_from(e), by_to[j] = soft.by_to(e);
      inner.add(soft, from[j], to[j]);
    }
  }

  const ScaleFactor<A> f = scale_factor(c.scale, A(c.tau_s), A(c.tau_t));
  const A loss = o.keep * f.value * divergence_value + (o.hard ? o.alpha * label.cross_entropy(o) : A(0));
  const A mass = o.keep_hard * label.mass + o.smoothing, spread = o.smoothing / label.finite;
  const HardGradient<A> by_label{label.softmax.max, log2_of(label.softmax.sum), mass, spread, o.keep_hard};
  const A inner_s = A(kLn2) * (o.reverse ? inner.from : inner.to);
  const A inner_t = A(kLn2) * (o.reverse ? inner.to : inner.from);
  const A by_tau_s = o.keep * (f.by_tau_s * divergence_value - f.value * inner_s / A(c.tau_s));
  const A by_tau_t = o.keep * (f.by_tau_t * divergence_value - f.value * inner_t / A(c.tau_t));
  std::printf("%.17g %.17g %.17g", double(loss), double(by_tau_s), double(by_tau_t));
  for (int j = 0; j < c.classes; ++j) {
    A g = o.keep * f.value / A(c.tau_s) * (o.reverse ? by_from[j] : by_to[j]);
    if (o.hard) g += o.alpha * by_label.at(mapped_s[j], A(w[j]));
    std::printf(" %.17g", double(g * o.map.slope(mapped_s[j])));
  }
  for (int j = 0; j < c.classes; ++j) {
    const A g = o.keep * f.value / A(c.tau_t) * (o.reverse ? by_to[j] : by_from[j]);
    std::printf(" %.17g", double(g * o.map.slope(mapped_t[j])));
  }
  std::printf("\n");
}

int main() {
  int fp64;
  Case c;
  while (std::scanf("%d %d %d %d %d %lf %lf %lf %lf %lf %lf %lf %lf", &fp64, &c.classes, &c.divergence, &c.scale,
                    &c.label, &c.tau_s, &c.tau_t, &c.alpha, &c.smoothing, &c.beta, &c.target_weight, &c.softcap,
                    &c.logit_scale) == 13) {
    std::vector<double> rows[3];
    for (auto& r : rows) {
      r.resize(c.classes);
      for (double& x : r)
        if (std::scanf("%lf", &x) != 1) return 1;
    }
    (fp64 ? row<double> : row<float>)(c, rows[0], rows[1], rows[2]);
  }
  return 0;
}
