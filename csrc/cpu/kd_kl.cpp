// kd_kl on the CPU: the row's loss, statistics and gradient with the row resident in cache.
//
//   loss = w [ alpha CE(s, labels) + (1 - alpha) scale D ],   u = s / tau_s, v = t / tau_t
//   D = sum p (k log p - log q)  (k = 1 for a KL, 0 for soft_ce; reverse_kl changes the roles)
//   ds = w [ (1 - alpha) scale (q - p) / tau_s + alpha (softmax(s) - target) ]
//
// Fused: two softmaxes, the divergence, the hard-label cross-entropy and the gradient. A row is swept twice, but
// only the first sweep reads memory: one exponential a softmax, kept in a row of scratch; the gradient. The softmax
// the hard labels see is the student's raised to tau_s where tau_s is 1, 2, 4 or 8.
// Memory: 3 passes over [rows, classes] (read s, t; write ds): 12 bytes an element in fp32, 6 in bf16.
// Source: Hinton, Vinyals, Dean 2015, eq. 1-4; docs/math/kd_kl.md.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../stable.h"
#include "gradients.h"
#include "kd_kl_other_row.h"
#include "kd_kl_row.h"
#include "kd_kl_run.h"
#include "rows.h"

namespace kdfast::cpu {
namespace {

// What is compiled once for each kind of vector unit.
#define KDFAST_ROW(T, A, CLONES)                                                                                     \
  CLONES HardSums spread_target(const Row<T, A>& row, double smoothing, A shift) {                                  \
    return hard_target<T, A>(row, smoothing, shift, nullptr, 0);                                                     \
  }                                                                                                                  \
  CLONES void temperatures(const Row<T, A>& row, const Found<A>& f, const Options& o, A* stats) {                    \
    if (o.divergence == kReverseKL) temperature_gradients<true>(row, f, o, stats);                                   \
    else temperature_gradients<false>(row, f, o, stats);                                                             \
  }                                                                                                                  \
  CLONES void teacher(const Row<T, A>& row, const Found<A>& f, const Options& o, double g) {                         \
    o.divergence == kReverseKL ? teacher_gradient<true>(row, f, g) : teacher_gradient<false>(row, f, g);             \
  }                                                                                                                  \
  CLONES void spread(const Row<T, A>& row, const Found<A>& f, const Options& o, double g, double g_1, double mass) { \
    if (o.divergence == kReverseKL) spread_gradient<true>(row, f, o, g, g_1, mass);                                  \
    else spread_gradient<false>(row, f, o, g, g_1, mass);                                                            \
  }                                                                                                                  \
  CLONES void compute(const Row<T, A>& row, const Options& o, A* loss, A* stats) {                                   \
    compute_row(row, o, Rare<T, A>{spread_target, temperatures, teacher, spread}, loss, stats);                      \
  }
#define KDFAST_ONCE
KDFAST_ROW(float, float, KDFAST_CLONES)
KDFAST_ROW(BFloat16Bits, float, KDFAST_CLONES)
KDFAST_ROW(double, double, KDFAST_ONCE)
#undef KDFAST_ONCE
#undef KDFAST_ROW
KDFAST_CLONES void compute_other(const Row<float, float>& row, const Options& o, float* loss, float* stats) {
  other_row(row, o, loss, stats);
}
void compute_other(const Row<double, double>& row, const Options& o, double* loss, double* stats) {
  other_row(row, o, loss, stats);
}
#define KDFAST_CAP(A)                                                                                              \
  KDFAST_CLONES void cap(A* x, int64_t n, double softcap, double scale) { cap_row(x, n, softcap, scale); }         \
  KDFAST_CLONES void uncap(A* gradient, const A* capped, int64_t n, double softcap, double scale) {                \
    uncap_gradient(gradient, capped, n, softcap, scale);                                                           \
  }
KDFAST_CAP(float)
KDFAST_CAP(double)
#undef KDFAST_CAP

using kdfast::data_or_null;
template <class T>
T* data_or_null(Tensor* x) {
  return x == nullptr ? nullptr : static_cast<T*>(x->data_ptr());
}
template <class T>
T* offset(T* x, int64_t by) {
  return x == nullptr ? nullptr : x + by;
}

// T is the storage type of the logits, A the type of the arithmetic and of every other floating point tensor.
template <class T, class A>
void rows(const Inputs& in, const Outputs& out, int64_t begin, int64_t end) {
  const int64_t n = in.student.size(1), padded = (n + kCount<A> - 1) / kCount<A> * kCount<A>;
  const bool capped = in.softcap > 0 || in.logit_scale != 1, other = in.divergence >= kJSD && in.alpha < 1;
  constexpr bool kHalf = std::is_same_v<T, HalfBits>;  // widening IEEE halves takes more than the rest of a sweep
  const bool staged = kHalf || capped || other;  // the row is first copied, widened and capped
  static thread_local std::vector<A> memory;  // kept between calls, so that no call faults pages in
  const int64_t needed = (staged ? 8 : 3) * padded;
  if (static_cast<int64_t>(memory.size()) < needed) memory.resize(needed);
  A* const scratch = memory.data();
  const bool stream = !staged && is_large(in.student.numel() * sizeof(T)) && n * sizeof(T) % 16 == 0;

  const T *student = static_cast<const T*>(in.student.data_ptr()), *teacher = static_cast<const T*>(in.teacher.data_ptr());
  if (in.alpha >= 1) teacher = student;  // nothing hangs on the teacher then, and 0 times what it holds need not be 0
  const int64_t* labels = data_or_null<int64_t>(in.labels);
  const A *target = data_or_null<A>(in.target), *grad = out.grad == nullptr ? nullptr : static_cast<const A*>(out.grad->data_ptr());
  const ValueOfRow<A> tau_s(in.student_temperature, in.tau_s), tau_t(in.teacher_temperature, in.tau_t), weight(in.weight, 1.0);
  A *const loss = data_or_null<A>(out.loss), *const stats = data_or_null<A>(out.stats);
  T *const student_grad = data_or_null<T>(out.student_grad), *const teacher_grad = data_or_null<T>(out.teacher_grad);
  const Options o{in.tau_s, in.tau_t, in.alpha, in.label_smoothing, in.ignore_index,
                  static_cast<int>(in.divergence), static_cast<int>(in.scale), in.beta, in.target_weight};

  for (int64_t i = begin; i < end; ++i) {
    T *const ds = offset(student_grad, i * n), *const dt = offset(teacher_grad, i * n);
    const bool ignored = labels != nullptr && labels[i] == in.ignore_index;
    if (ignored || (labels != nullptr && (labels[i] < 0 || labels[i] >= n))) {
      const A value = ignored ? A(0) : std::numeric_limits<A>::quiet_NaN();
      T narrow_value;
      narrow(value, &narrow_value);
      if (loss != nullptr) loss[i] = value, std::fill_n(stats + i * kStats, kStats, value);
      if (ds != nullptr) std::fill_n(ds, n, narrow_value);
      if (dt != nullptr) std::fill_n(dt, n, narrow_value);
      continue;
    }

    Row<T, A> row{};
    row.student = student + i * n, row.teacher = teacher + i * n, row.target = offset(target, i * n);
    row.e_u = scratch, row.e_v = scratch + padded, row.spare = scratch + 2 * padded;
    row.n = n;
    row.label = labels != nullptr ? labels[i] : -1;
    row.tau_s = tau_s[i], row.tau_t = tau_t[i], row.weight = weight[i];
    row.coefficient = grad != nullptr ? grad[i] : out.coefficient;
    row.temperature_grad = out.temperature_grad;
    row.student_grad = ds, row.teacher_grad = dt;
    row.more = (i + 1) * n + kCount<A> <= in.student.numel();
    row.stream = stream;
    A *const row_loss = offset(loss, i), *const row_stats = offset(stats, i * kStats);
    if constexpr (!kHalf) {
      if (!staged) {
        compute(row, o, row_loss, row_stats);
        continue;
      }
    }

    A *const buffers = scratch + 3 * padded, *const s = buffers, *const t = buffers + padded;
    load(row.student, s, n, padded);
    load(row.teacher, t, n, padded);
    if (capped) cap(s, n, in.softcap, in.logit_scale), cap(t, n, in.softcap, in.logit_scale);
    Row<A, A> copy{s, t, row.target, row.e_u, row.e_v, row.spare};
    if (target != nullptr) {
      copy.target = std::copy_n(row.target, n, buffers + 2 * padded) - n;
      std::fill(buffers + 2 * padded + n, buffers + 3 * padded, A(0));
    }
    copy.n = padded;
    copy.label = row.label, copy.tau_s = row.tau_s, copy.tau_t = row.tau_t, copy.weight = row.weight;
    copy.coefficient = row.coefficient, copy.temperature_grad = row.temperature_grad, copy.more = true;
    copy.student_grad = ds != nullptr ? buffers + 3 * padded : nullptr;
    copy.teacher_grad = dt != nullptr ? buffers + 4 * padded : nullptr;
    other ? compute_other(copy, o, row_loss, row_stats) : compute(copy, o, row_loss, row_stats);
    if (capped && ds != nullptr) uncap(copy.student_grad, s, n, in.softcap, in.logit_scale);
    if (capped && dt != nullptr) uncap(copy.teacher_grad, t, n, in.softcap, in.logit_scale);
    if (ds != nullptr) store(copy.student_grad, ds, n);
    if (dt != nullptr) store(copy.teacher_grad, dt, n);
  }
  if (stream) stream_end();
}

}  // namespace

void run(const Inputs& in, const Outputs& out) {
  STD_TORCH_CHECK(in.alpha == 0 || in.labels.has_value() || in.target.has_value(), "kd_kl: alpha > 0 needs labels");
  STD_TORCH_CHECK(in.divergence != kDKD || in.labels.has_value(), "kd_kl: dkd needs class indices");
  const bool contiguous = in.student.is_contiguous() && in.teacher.is_contiguous() &&
                          (!in.target.has_value() || in.target->is_contiguous()) &&
                          (out.grad == nullptr || out.grad->is_contiguous());
  STD_TORCH_CHECK(contiguous, "kd_kl: student, teacher, target and grad must be contiguous");
  with_types(in.student.scalar_type(), [&](auto t, auto a) {
    over_rows(in.student.size(0), in.student.size(1),
              [&](int64_t begin, int64_t end) { rows<decltype(t), decltype(a)>(in, out, begin, end); });
  });
}

namespace {

std::tuple<Tensor, Tensor> empty_loss_and_stats(const Tensor& student) {
  const ScalarType type = accumulate_type(student.scalar_type());
  return {empty(student, {student.size(0)}, type), empty(student, {student.size(0), kStats}, type)};
}

std::tuple<Tensor, Tensor> kd_kl(
    Tensor student, Tensor teacher, OptionalTensor student_temperature, OptionalTensor teacher_temperature,
    OptionalTensor labels, OptionalTensor target, OptionalTensor weight, double tau_s, double tau_t, double alpha,
    double label_smoothing, int64_t ignore_index, int64_t divergence, int64_t scale,
    double beta, double target_weight, double softcap, double logit_scale, bool temperature_grad) {
  const Inputs in{student, teacher, student_temperature, teacher_temperature, labels, target, weight,
                  tau_s, tau_t, alpha, label_smoothing, ignore_index, divergence, scale, beta, target_weight, softcap, logit_scale};
  auto [loss, stats] = empty_loss_and_stats(student);
  run(in, {.loss = &loss, .stats = &stats, .temperature_grad = temperature_grad});
  return {loss, stats};
}

std::tuple<Tensor, Tensor, Tensor> kd_kl_value_and_grad(
    Tensor student, Tensor teacher, OptionalTensor student_temperature, OptionalTensor teacher_temperature,
    OptionalTensor labels, OptionalTensor target, OptionalTensor weight, double tau_s, double tau_t, double alpha,
    double label_smoothing, int64_t ignore_index, int64_t divergence, int64_t scale,
    double beta, double target_weight, double softcap, double logit_scale, bool temperature_grad, double coefficient) {
  const Inputs in{student, teacher, student_temperature, teacher_temperature, labels, target, weight,
                  tau_s, tau_t, alpha, label_smoothing, ignore_index, divergence, scale, beta, target_weight, softcap, logit_scale};
  Tensor student_grad = empty_gradient(student);
  auto [loss, stats] = empty_loss_and_stats(student);
  run(in, {.loss = &loss, .stats = &stats, .student_grad = &student_grad, .coefficient = coefficient,
           .temperature_grad = temperature_grad});
  return {scaled_sum(loss, coefficient), stats, student_grad};
}

// The statistics are the GPU's: with the row in cache, making them anew costs less than reading them back.
std::tuple<Tensor, Tensor> kd_kl_backward(
    Tensor grad, Tensor student, Tensor teacher, OptionalTensor student_temperature,
    OptionalTensor teacher_temperature, OptionalTensor labels, OptionalTensor target, OptionalTensor weight,
    Tensor /*stats*/, double tau_s, double tau_t, double alpha, double label_smoothing, int64_t ignore_index,
    int64_t divergence, int64_t scale,
    double beta, double target_weight, double softcap, double logit_scale, bool student_grad, bool teacher_grad) {
  const Inputs in{student, teacher, student_temperature, teacher_temperature, labels, target, weight,
                  tau_s, tau_t, alpha, label_smoothing, ignore_index, divergence, scale, beta, target_weight, softcap, logit_scale};
  const Tensor nothing = empty(student, {0}, student.scalar_type());
  Tensor ds = student_grad ? empty_gradient(student) : nothing;
  Tensor dt = teacher_grad ? empty_gradient(teacher) : nothing;
  run(in, {.student_grad = student_grad ? &ds : nullptr, .teacher_grad = teacher_grad ? &dt : nullptr, .grad = &grad});
  return {ds, dt};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("kd_kl", TORCH_BOX(&kdfast::cpu::kd_kl));
  m.impl("kd_kl_backward", TORCH_BOX(&kdfast::cpu::kd_kl_backward));
  m.impl("kd_kl_value_and_grad", TORCH_BOX(&kdfast::cpu::kd_kl_value_and_grad));
}
