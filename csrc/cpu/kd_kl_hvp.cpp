// kd_kl_hvp on the CPU: the Hessian of a row's loss times a direction, the row resident in cache.
//
//   h = H (w_s, w_t, w_tau_s, w_tau_t),  loss = w [ alpha CE + (1 - alpha) c D ];  formulas: ../math/kd_kl_hvp.h
//   hard part: h_s += w alpha mass J(softmax(s)) w_s
//
// Fused: two or three softmaxes, every inner product with the direction, both products and the temperatures'. A row
// is swept three times, the first alone reading memory: maxima; the exponentials, kept in scratch, with all sums (they
// need nothing but the maxima); the products. The hard labels add a sweep over scratch.
// Memory: reads s, t and the directions given, writes the products wanted: for w_s and h_s in fp32 16 bytes an element.
// Source: docs/math/kd_kl_hvp.md.
#include <limits>
#include <numeric>
#include <vector>

#include "../math/kd_kl_hvp.h"
#include "gradients.h"
#include "rows.h"

namespace kdfast::cpu {
namespace {

namespace second = kdfast::kd_kl_hvp;

template <class A>
struct Logits {
  const A *x, *w;  // [n] logits, [n] their direction
  A *e, *h;        // [n] scratch for the exponentials, [n] the product
  double tau, w_tau;
};

template <class A>
struct HvpRow {
  Logits<A> from, to;        // those that weigh, and the others
  bool student_weighs;
  A* e_hard;                 // [n] scratch
  int64_t n;
  double k;                  // 1, or 0 for soft_ce
  second::Scale<double> scale;
  double soft, hard;         // the row's factors: of D, and of the hard labels times their mass
};

struct HvpSums {
  double z_from = 0, z_to = 0, cross = 0, from_dot = 0, to_dot = 0, to_dot_from = 0, r_dot = 0, z_hard = 0, w_hard = 0;
};

// x where it is finite: a masked class is measured as 0, its probability being 0.
template <class A>
KDFAST_INLINE A unmasked(A x) {
  return x == -std::numeric_limits<A>::infinity() ? A(0) : x;
}

template <class A>
KDFAST_INLINE HvpSums hvp_sums(const HvpRow<A>& row, A max_from, A max_to) {
  HvpSums sums;
  const Logits<A>&f = row.from, &t = row.to;
  const A per_f = static_cast<A>(1 / f.tau), per_t = static_cast<A>(1 / t.tau), k = static_cast<A>(row.k);
  const A tau_f = static_cast<A>(f.w_tau), tau_t = static_cast<A>(t.w_tau);
  const ExpScale<A> scale_f(1 / f.tau), scale_t(1 / t.tau);
  const A *const x_f = f.x, *const x_t = t.x, *const w_f = f.w, *const w_t = t.w;
  A *const e_f = f.e, *const e_t = t.e;
  for (int64_t begin = 0; begin < row.n; begin += kBlock) {
    const int64_t end = begin + kBlock < row.n ? begin + kBlock : row.n;
    A z_from = 0, z_to = 0, cross = 0, from_dot = 0, to_dot = 0, to_dot_from = 0, r_dot = 0;
#pragma omp simd reduction(+ : z_from, z_to, cross, from_dot, to_dot, to_dot_from, r_dot)
    for (int64_t j = begin; j < end; ++j) {
      const A d_f = x_f[j] - max_from, d_t = x_t[j] - max_to;
      const A p = exp_nonpositive(d_f, scale_f), q = exp_nonpositive(d_t, scale_t);
      const A y_f = d_f * per_f, y_t = d_t * per_t;
      const A dot_f = (w_f[j] - unmasked(y_f) * tau_f) * per_f, dot_t = (w_t[j] - unmasked(y_t) * tau_t) * per_t;
      const A weighed = p == A(0) ? A(0) : p * (k * y_f - y_t);
      e_f[j] = p;
      e_t[j] = q;
      z_from += p;
      z_to += q;
      cross += weighed;
      from_dot += p * dot_f;
      to_dot += q * dot_t;
      to_dot_from += p * dot_t;
      r_dot += weighed * dot_f;
    }
    sums.z_from += z_from, sums.z_to += z_to, sums.cross += cross, sums.from_dot += from_dot, sums.to_dot += to_dot;
    sums.to_dot_from += to_dot_from, sums.r_dot += r_dot;
  }
  return sums;
}

// What the temperatures' products need beside the sums: <g, z> and <g., z> + <g, z.> of both sides.
struct Inner {
  double from = 0, from_dot = 0, to = 0, to_dot = 0;
};

template <bool Temperatures, class A>
KDFAST_INLINE Inner hvp_products(const HvpRow<A>& row, const HvpSums& sums, A max_from, A max_to, double d, double d_change,
                                 second::Factors<double> by_from, second::Factors<double> by_to) {
  Inner inner;
  const Logits<A>&f = row.from, &t = row.to;
  const A per_f = static_cast<A>(1 / f.tau), per_t = static_cast<A>(1 / t.tau), k = static_cast<A>(row.k);
  const A tau_f = static_cast<A>(f.w_tau), tau_t = static_cast<A>(t.w_tau);
  const A per_zf = static_cast<A>(1 / sums.z_from), per_zt = static_cast<A>(1 / sums.z_to);
  const A mean_f = static_cast<A>(sums.from_dot / sums.z_from), mean_t = static_cast<A>(sums.to_dot / sums.z_to);
  const A log_zf = static_cast<A>(std::log(sums.z_from)), log_zt = static_cast<A>(std::log(sums.z_to));
  const A shift = static_cast<A>(std::log(sums.z_to) - row.k * std::log(sums.z_from) - d);
  const A d_dot = static_cast<A>(d_change);
  const A b_g = static_cast<A>(by_from.of_gradient), b_change = static_cast<A>(by_from.of_change);
  const A a_g = static_cast<A>(by_to.of_gradient), a_change = static_cast<A>(by_to.of_change);
  const A *const x_f = f.x, *const x_t = t.x, *const w_f = f.w, *const w_t = t.w, *const e_f = f.e, *const e_t = t.e;
  A *const h_f = f.h, *const h_t = t.h;
  for (int64_t begin = 0; begin < row.n; begin += kBlock) {
    const int64_t end = begin + kBlock < row.n ? begin + kBlock : row.n;
    A from = 0, from_dot = 0, to = 0, to_dot = 0;
#pragma omp simd reduction(+ : from, from_dot, to, to_dot)
    for (int64_t j = begin; j < end; ++j) {
      const A y_f = (x_f[j] - max_from) * per_f, y_t = (x_t[j] - max_to) * per_t;
      const A dot_f = (w_f[j] - unmasked(y_f) * tau_f) * per_f - mean_f;
      const A dot_t = (w_t[j] - unmasked(y_t) * tau_t) * per_t - mean_t;
      const A p = e_f[j] * per_zf, q = e_t[j] * per_zt;
      const A excess = e_f[j] == A(0) ? A(0) : k * y_f - y_t + shift;
      const second::Element<A> e = second::element(p, q, excess, dot_f, dot_t, k, d_dot);
      h_f[j] = b_g * e.b + b_change * e.b_dot;
      h_t[j] = a_g * e.a + a_change * e.a_dot;
      if constexpr (Temperatures) {
        const A log_p = unmasked(y_f) - log_zf, log_q = unmasked(y_t) - log_zt;
        from += e.b * log_p;
        from_dot += e.b_dot * log_p + e.b * dot_f;
        to += e.a * log_q;
        to_dot += e.a_dot * log_q + e.a * dot_t;
      }
    }
    inner.from += from, inner.from_dot += from_dot, inner.to += to, inner.to_dot += to_dot;
  }
  return inner;
}

// h_s += hard J(softmax(s)) w_s, at temperature one.
template <class A>
KDFAST_INLINE void add_hard(const HvpRow<A>& row, const Logits<A>& student, A max) {
  const A *const x = student.x, *const w = student.w;
  A *const e = row.e_hard, *const h = student.h;
  const ExpScale<A> scale(1.0);
  double z = 0, dot = 0;
  for (int64_t begin = 0; begin < row.n; begin += kBlock) {
    const int64_t end = begin + kBlock < row.n ? begin + kBlock : row.n;
    A z_block = 0, dot_block = 0;
#pragma omp simd reduction(+ : z_block, dot_block)
    for (int64_t j = begin; j < end; ++j) {
      e[j] = exp_nonpositive(x[j] - max, scale);
      z_block += e[j];
      dot_block += e[j] * w[j];
    }
    z += z_block, dot += dot_block;
  }
  const A factor = static_cast<A>(row.hard / z), mean = static_cast<A>(dot / z);
#pragma omp simd
  for (int64_t j = 0; j < row.n; ++j) h[j] += factor * e[j] * (w[j] - mean);
}

template <class A>
KDFAST_INLINE void hvp_row(const HvpRow<A>& row, A* h_tau_from, A* h_tau_to) {
  const Logits<A>&f = row.from, &t = row.to;
  const A max_from = row_max(f.x, row.n), max_to = row_max(t.x, row.n);
  if (row.soft != 0) {
    const HvpSums sums = hvp_sums(row, max_from, max_to);
    const double log_zf = std::log(sums.z_from), log_zt = std::log(sums.z_to), raise = log_zt - row.k * log_zf;
    const double d = sums.cross / sums.z_from + raise;
    const double d_dot = sums.to_dot / sums.z_to + (sums.r_dot + (raise - d) * sums.from_dot - sums.to_dot_from) / sums.z_from;
    const auto by_from = second::factors(row.scale, row.soft, f.tau, f.w_tau);
    const auto by_to = second::factors(row.scale, row.soft, t.tau, t.w_tau);
    if (h_tau_from == nullptr && h_tau_to == nullptr) {
      hvp_products<false>(row, sums, max_from, max_to, d, d_dot, by_from, by_to);
    } else {
      const Inner inner = hvp_products<true>(row, sums, max_from, max_to, d, d_dot, by_from, by_to);
      const auto &c = row.scale;
      const double by_s = c.by_s_dot * d + c.by_s * d_dot, by_t = c.by_t_dot * d + c.by_t * d_dot;
      const double on_from = row.student_weighs ? by_s : by_t, on_to = row.student_weighs ? by_t : by_s;
      if (h_tau_from != nullptr) {
        *h_tau_from = static_cast<A>(row.soft * on_from - by_from.of_gradient * inner.from - by_from.of_change * inner.from_dot);
      }
      if (h_tau_to != nullptr) {
        *h_tau_to = static_cast<A>(row.soft * on_to - by_to.of_gradient * inner.to - by_to.of_change * inner.to_dot);
      }
    }
  } else {
    for (int64_t j = 0; j < row.n; ++j) f.h[j] = t.h[j] = 0;
    if (h_tau_from != nullptr) *h_tau_from = 0;
    if (h_tau_to != nullptr) *h_tau_to = 0;
  }
  if (row.hard != 0) row.student_weighs ? add_hard(row, f, max_from) : add_hard(row, t, max_to);
}

// What is compiled once for each kind of vector unit.
KDFAST_CLONES void compute(const HvpRow<float>& row, float* by_from, float* by_to) { hvp_row(row, by_from, by_to); }
void compute(const HvpRow<double>& row, double* by_from, double* by_to) { hvp_row(row, by_from, by_to); }

struct HvpCall {
  Tensor student, teacher;                                  // [rows, classes]
  OptionalTensor student_temperature, teacher_temperature;  // [1] or [rows]
  OptionalTensor labels, target, weight;                    // [rows], [rows, classes], [rows]
  OptionalTensor w_student, w_teacher, w_tau_s, w_tau_t;    // as what they are directions of
  double tau_s, tau_t, alpha, smoothing;
  int64_t ignore_index, divergence, scale;
  Tensor h_student, h_teacher, h_tau_s, h_tau_t;            // as well; empty where not wanted
};

template <class T, class A>
void rows(const HvpCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.student.size(1), padded = padded_to_lanes(n);
  const bool direct = in_place<T, A>(n), reverse = call.divergence == 1;
  static thread_local std::vector<A> memory;  // kept between calls, so that no call faults pages in
  if (static_cast<int64_t>(memory.size()) < 10 * padded) memory.resize(10 * padded);
  A* const zeros = memory.data();
  std::fill_n(zeros, padded, A(0));
  const auto scratch = [&](int i) { return memory.data() + i * padded; };

  const int64_t* labels = data_or_null<int64_t>(call.labels);
  const A* target = data_or_null<A>(call.target);
  const ValueOfRow<A> tau_s(call.student_temperature, call.tau_s), tau_t(call.teacher_temperature, call.tau_t);
  const ValueOfRow<A> weight(call.weight, 1.0), w_tau_s(call.w_tau_s, 0.0), w_tau_t(call.w_tau_t, 0.0);
  A *const h_tau_s = column_or_null<A>(call.h_tau_s), *const h_tau_t = column_or_null<A>(call.h_tau_t);

  // A side's logits or direction in the arithmetic type: where they lie, or a copy padded with `fill`.
  const auto in_arithmetic = [&](const T* x, int64_t i, A* copy, A fill) -> const A* {
    if (x == nullptr) return zeros;
    if constexpr (std::is_same_v<T, A>) {
      if (direct) return x + i * n;
    }
    load(x + i * n, copy, n, padded);
    std::fill(copy + n, copy + padded, fill);
    return copy;
  };
  const auto product = [&](T* x, int64_t i, A* copy) -> A* {
    if constexpr (std::is_same_v<T, A>) {
      if (direct && x != nullptr) return x + i * n;
    }
    return copy;
  };
  const T *student = static_cast<const T*>(call.student.data_ptr()), *teacher = static_cast<const T*>(call.teacher.data_ptr());
  const T *w_student = data_or_null<T>(call.w_student), *w_teacher = data_or_null<T>(call.w_teacher);
  T *const h_student = column_or_null<T>(call.h_student), *const h_teacher = column_or_null<T>(call.h_teacher);
  constexpr A kMasked = -std::numeric_limits<A>::infinity();

  for (int64_t i = begin; i < end; ++i) {
    const bool ignored = labels != nullptr && labels[i] == call.ignore_index;
    if (ignored || (labels != nullptr && (labels[i] < 0 || labels[i] >= n))) {
      const A value = ignored ? A(0) : std::numeric_limits<A>::quiet_NaN();
      T narrow_value;
      narrow(value, &narrow_value);
      if (h_student != nullptr) std::fill_n(h_student + i * n, n, narrow_value);
      if (h_teacher != nullptr) std::fill_n(h_teacher + i * n, n, narrow_value);
      if (h_tau_s != nullptr) h_tau_s[i] = value;
      if (h_tau_t != nullptr) h_tau_t[i] = value;
      continue;
    }
    const Logits<A> s{in_arithmetic(student, i, scratch(1), kMasked), in_arithmetic(w_student, i, scratch(2), 0),
                      scratch(3), product(h_student, i, scratch(4)), tau_s[i], w_tau_s[i]};
    const Logits<A> t{in_arithmetic(teacher, i, scratch(5), kMasked), in_arithmetic(w_teacher, i, scratch(6), 0),
                      scratch(7), product(h_teacher, i, scratch(8)), tau_t[i], w_tau_t[i]};
    double mass = 1;
    if (target != nullptr && call.alpha > 0) {
      mass = (1 - call.smoothing) * std::accumulate(target + i * n, target + (i + 1) * n, 0.0) + call.smoothing;
    }
    const HvpRow<A> row{reverse ? s : t, reverse ? t : s, reverse, scratch(9), direct ? n : padded,
                        call.divergence == 2 ? 0.0 : 1.0,
                        second::scale_of(static_cast<int>(call.scale), s.tau, t.tau, s.w_tau, t.w_tau),
                        weight[i] * (1 - call.alpha), weight[i] * call.alpha * mass};
    A* const by_s = h_tau_s == nullptr ? nullptr : h_tau_s + i;
    A* const by_t = h_tau_t == nullptr ? nullptr : h_tau_t + i;
    compute(row, reverse ? by_s : by_t, reverse ? by_t : by_s);
    if (h_student != nullptr && !direct) store(s.h, h_student + i * n, n);
    if (h_teacher != nullptr && !direct) store(t.h, h_teacher + i * n, n);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kd_kl_hvp(
    Tensor student, Tensor teacher, OptionalTensor student_temperature, OptionalTensor teacher_temperature,
    OptionalTensor labels, OptionalTensor target, OptionalTensor weight, OptionalTensor w_student,
    OptionalTensor w_teacher, OptionalTensor w_tau_s, OptionalTensor w_tau_t, double tau_s, double tau_t, double alpha,
    double label_smoothing, int64_t ignore_index, int64_t divergence, int64_t scale, double /*beta*/,
    double /*target_weight*/, double softcap, double logit_scale, bool student_wanted, bool teacher_wanted) {
  STD_TORCH_CHECK(divergence <= 2 && softcap == 0 && logit_scale == 1, "kd_kl_hvp: forward_kl, reverse_kl or soft_ce");
  const ScalarType type = student.scalar_type(), sum_type = accumulate_type(type);
  const int64_t n = student.size(0);
  const auto product = [&](bool wanted) { return wanted ? empty_gradient(student) : empty(student, {0}, type); };
  const auto column = [&](bool wanted) { return empty(student, {wanted ? n : 0}, sum_type); };
  const HvpCall call{student, teacher, student_temperature, teacher_temperature, labels, target, weight,
                     w_student, w_teacher, w_tau_s, w_tau_t, tau_s, tau_t, alpha, label_smoothing, ignore_index,
                     divergence, scale, product(student_wanted), product(teacher_wanted),
                     column(student_temperature.has_value()), column(teacher_temperature.has_value())};
  with_types(type, [&](auto t, auto a) {
    over_rows(n, student.size(1), [&](int64_t begin, int64_t end) { rows<decltype(t), decltype(a)>(call, begin, end); });
  });
  return {call.h_student, call.h_teacher, call.h_tau_s, call.h_tau_t};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("kd_kl_hvp", TORCH_BOX(&kdfast::cpu::kd_kl_hvp)); }
