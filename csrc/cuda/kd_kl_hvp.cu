// kd_kl_hvp on the GPU: the Hessian of a row's loss times a direction. Formulas: ../math/kd_kl_hvp.h.
//
//   h = H (w_s, w_t, w_tau_s, w_tau_t),  loss = w [ alpha CE + (1 - alpha) c D ]
//
// Fused: three softmaxes, every inner product with the direction, both products and the temperatures'. A group of
// threads walks its row three times: the normalisers (online), the inner products, the products. Only the first walk
// reads s and t, and only the second the directions, from memory; the rest comes from the caches up to rows of about
// 100 KB. Memory for a row of C classes of b bytes: reads s, t and the directions given (C b each), writes C b for each
// product wanted: 4 passes over [rows, classes] for w_s and h_s.
// Source: docs/math/kd_kl_hvp.md.
#include <type_traits>

#include "../math/kd_kl_hvp.h"
#include "launch.h"

namespace kdfast::cuda {
namespace {

namespace second = kdfast::kd_kl_hvp;

// Threads a block at most, blocks a multiprocessor at least: the second and the third walk want about 100 registers.
// Of two blocks one reads while the other waits for its sums.
constexpr int kLanesThreads = 128;
constexpr int kBlockThreads = 256;
template <class A, class Group>
constexpr int kFewestBlocks = sizeof(A) == 8 ? 1 : std::is_same_v<Group, BlockGroup> ? 2 : 4;

template <class T>
struct Side {
  const T *x, *w;  // [rows, classes] logits, their direction or null
  T* h;            // [rows, classes] product, or null
};

template <class T, class A>
struct HvpCall {
  Side<T> student, teacher;
  Column<A> tau_s, tau_t, w_tau_s, w_tau_t;  // [1] or [rows], or null
  Column<int64_t> labels;                    // [rows], or null
  const A* target;                           // [rows, classes], or null
  Column<A> weight;                          // [rows], or null
  A *h_tau_s, *h_tau_t;                      // [rows], or null
  A constant_tau_s, constant_tau_t, alpha, smoothing, k;
  int64_t rows, ignore_index;
  int classes, lanes, scale;
  bool aligned, reverse;
};

template <class A>
__device__ A value_of(const Column<A>& column, int64_t row, A otherwise) {
  return column.data == nullptr ? otherwise : column.at(row);
}

template <class A>
struct Normalisers {
  OnlineSoftmax<A> from, to, hard;
  A target = 0;
};

template <class A>
struct InnerProducts {
  A divergence = 0, from_dot = 0, to_dot = 0, to_dot_from = 0, r_dot = 0, hard_dot = 0;
  A mean_log_p = 0, mean_log_q = 0;
};

template <class A>
struct Ends {
  A from = 0, from_dot = 0, to = 0, to_dot = 0;
};

template <class A>
__device__ A unmasked(A x) {
  return x == -kInfinity<A> ? A(0) : x;
}

template <class T, class A>
__device__ void load_widened(const T* row, const Chunks<kChunk<T>>& chunks, int first, T fill, A (&out)[kChunk<T>]) {
  if (row == nullptr) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) out[i] = A(0);
  } else {
    widen(load(row, chunks, first, fill), out);
  }
}

template <class T>
__device__ T* at_row(T* x, int64_t begin) {
  return x == nullptr ? nullptr : x + begin;
}

template <class T, class A, class Group>
__global__ void __launch_bounds__(std::is_same_v<Group, BlockGroup> ? kBlockThreads : kLanesThreads,
                                  kFewestBlocks<A, Group>) hvp(const HvpCall<T, A> call) {
  constexpr int N = kChunk<T>;
  const Group group(call.lanes);
  const int64_t index = group.row();
  const bool exists = index < call.rows;
  const int64_t row = exists ? index : 0, begin = row * call.classes;
  const Chunks<N> chunks(row, call.classes, call.aligned);
  const T masked = static_cast<T>(-kInfinity<A>), zero = static_cast<T>(A(0));

  bool counts = exists;
  A coefficient = value_of(call.weight, row, A(1));
  if (call.labels.data != nullptr) {
    const int64_t label = call.labels.at(row);
    counts = exists && label != call.ignore_index;
    if (label < 0 || label >= call.classes) coefficient = NAN;  // the row's products say so
  }
  const bool soft = call.alpha < A(1), hard = call.alpha > A(0);
  const A tau_s = value_of(call.tau_s, row, call.constant_tau_s), tau_t = value_of(call.tau_t, row, call.constant_tau_t);
  const A w_tau_s = value_of(call.w_tau_s, row, A(0)), w_tau_t = value_of(call.w_tau_t, row, A(0));
  const A tau_from = call.reverse ? tau_s : tau_t, tau_to = call.reverse ? tau_t : tau_s;
  const A w_tau_from = call.reverse ? w_tau_s : w_tau_t, w_tau_to = call.reverse ? w_tau_t : w_tau_s;
  const A per_from = A(1) / tau_from, per_to = A(1) / tau_to;
  const Side<T> &from_side = call.reverse ? call.student : call.teacher, &to_side = call.reverse ? call.teacher : call.student;
  const T *x_from = from_side.x + begin, *x_to = to_side.x + begin;
  const T *w_from = at_row(from_side.w, begin), *w_to = at_row(to_side.w, begin);
  const A* target = call.target == nullptr ? nullptr : call.target + begin;
  const int count = counts ? chunks.count : 0;  // no early return: the reductions want every lane

  Normalisers<A> z;
  for (int chunk = group.lane; chunk < count; chunk += group.lanes) {
    const int first = chunks.first(chunk);
    A x[N], y[N];
    load_widened(x_from, chunks, first, masked, x);
    load_widened(x_to, chunks, first, masked, y);
    A from_max = z.from.max, to_max = z.to.max;
#pragma unroll
    for (int i = 0; i < N; ++i) from_max = larger(from_max, x[i]), to_max = larger(to_max, y[i]);
    z.from.raise(from_max, A(kLog2e) * per_from);
    z.to.raise(to_max, A(kLog2e) * per_to);
    if (hard) z.hard.raise(call.reverse ? from_max : to_max, A(kLog2e));
    const A from_base = base_of(from_max), to_base = base_of(to_max);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      z.from.sum += exp2_of(A(kLog2e) * per_from * (x[i] - from_base));
      z.to.sum += exp2_of(A(kLog2e) * per_to * (y[i] - to_base));
      if (hard) z.hard.sum += exp2_of(A(kLog2e) * (call.reverse ? x[i] - from_base : y[i] - to_base));
    }
    if (hard && target != nullptr) {
      A given[N];
      load_beside(target, chunks, first, A(0), given);
#pragma unroll
      for (int i = 0; i < N; ++i) z.target += given[i];
    }
  }
  group.reduce(z, [&](Normalisers<A>& s, int lanes) {
    s.from.raise(max_over(s.from.max, lanes), A(kLog2e) * per_from);
    s.to.raise(max_over(s.to.max, lanes), A(kLog2e) * per_to);
    s.hard.raise(max_over(s.hard.max, lanes), A(kLog2e));
    s.from.sum = sum_over(s.from.sum, lanes), s.to.sum = sum_over(s.to.sum, lanes);
    s.hard.sum = sum_over(s.hard.sum, lanes), s.target = sum_over(s.target, lanes);
  });
  const A log_z_from = A(kLn2) * log2_of(z.from.sum), log_z_to = A(kLn2) * log2_of(z.to.sum);
  const A max_from = z.from.max, max_to = z.to.max, max_s = call.reverse ? max_from : max_to;
  const A per_z_hard = A(1) / z.hard.sum;

  // One element: log p, log q, and the directions of u and v, from logits and their directions.
  const auto log_p_of = [&](A x) { return (x - max_from) * per_from - log_z_from; };
  const auto log_q_of = [&](A y) { return (y - max_to) * per_to - log_z_to; };
  const auto exp_of = [](A x) { return exp2_of(A(kLog2e) * x); };

  InnerProducts<A> sums;
  for (int chunk = group.lane; chunk < count; chunk += group.lanes) {
    const int first = chunks.first(chunk);
    A x[N], y[N], wx[N], wy[N];
    load_widened(x_from, chunks, first, masked, x);
    load_widened(x_to, chunks, first, masked, y);
    load_widened(w_from, chunks, first, zero, wx);
    load_widened(w_to, chunks, first, zero, wy);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A log_p = log_p_of(x[i]), log_q = log_q_of(y[i]), p = exp_of(log_p), q = exp_of(log_q);
      const A dot_from = (wx[i] - unmasked(log_p) * w_tau_from) * per_from;
      const A dot_to = (wy[i] - unmasked(log_q) * w_tau_to) * per_to;
      const A weighed = p == A(0) ? A(0) : p * (call.k * log_p - log_q);
      sums.mean_log_p += p * unmasked(log_p);
      sums.mean_log_q += q * unmasked(log_q);
      sums.divergence += weighed;
      sums.r_dot += weighed * dot_from;
      sums.from_dot += p * dot_from;
      sums.to_dot += q * dot_to;
      sums.to_dot_from += p * dot_to;
      if (hard) {
        sums.hard_dot += exp_of((call.reverse ? x[i] : y[i]) - max_s) * per_z_hard * (call.reverse ? wx[i] : wy[i]);
      }
    }
  }
  group.reduce(sums, [](InnerProducts<A>& s, int lanes) {
    s.divergence = sum_over(s.divergence, lanes), s.from_dot = sum_over(s.from_dot, lanes);
    s.to_dot = sum_over(s.to_dot, lanes), s.to_dot_from = sum_over(s.to_dot_from, lanes);
    s.r_dot = sum_over(s.r_dot, lanes), s.hard_dot = sum_over(s.hard_dot, lanes);
    s.mean_log_p = sum_over(s.mean_log_p, lanes), s.mean_log_q = sum_over(s.mean_log_q, lanes);
  });

  const A d = sums.divergence;
  const A d_dot = sums.to_dot - sums.to_dot_from + sums.r_dot - d * sums.from_dot;
  const A factor = soft ? coefficient * (A(1) - call.alpha) : A(0);
  const auto c = second::scale_of(call.scale, tau_s, tau_t, w_tau_s, w_tau_t);
  const auto by_from = second::factors(c, factor, tau_from, w_tau_from);
  const auto by_to = second::factors(c, factor, tau_to, w_tau_to);
  const A mass = call.target == nullptr ? A(1) : (A(1) - call.smoothing) * z.target + call.smoothing;
  const A of_hard = hard ? coefficient * call.alpha * mass * per_z_hard : A(0);
  T *const h_from = at_row(from_side.h, begin), *const h_to = at_row(to_side.h, begin);

  Ends<A> ends;
  for (int chunk = group.lane; chunk < (exists ? chunks.count : 0); chunk += group.lanes) {
    const int first = chunks.first(chunk);
    Vector<T> out_from{}, out_to{};
    if (counts) {  // an ignored row has products 0, whatever its logits hold
      A x[N], y[N], wx[N], wy[N];
      load_widened(x_from, chunks, first, masked, x);
      load_widened(x_to, chunks, first, masked, y);
      load_widened(w_from, chunks, first, zero, wx);
      load_widened(w_to, chunks, first, zero, wy);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A into_from = 0, into_to = 0;
        if (soft) {
          const A log_p = log_p_of(x[i]), log_q = log_q_of(y[i]), p = exp_of(log_p);
          const A dot_from = (wx[i] - unmasked(log_p) * w_tau_from) * per_from - sums.from_dot;
          const A dot_to = (wy[i] - unmasked(log_q) * w_tau_to) * per_to - sums.to_dot;
          const A excess = p == A(0) ? A(0) : call.k * log_p - log_q - d;
          const auto e = second::element(p, exp_of(log_q), excess, dot_from, dot_to, call.k, d_dot);
          into_from = by_from.of_gradient * e.b + by_from.of_change * e.b_dot;
          into_to = by_to.of_gradient * e.a + by_to.of_change * e.a_dot;
          // less the means: what rounding left in the sums of a and b does no harm then
          const A from = unmasked(log_p) - sums.mean_log_p, to = unmasked(log_q) - sums.mean_log_q;
          ends.from += e.b * from;
          ends.from_dot += e.b_dot * from + e.b * dot_from;
          ends.to += e.a * to;
          ends.to_dot += e.a_dot * to + e.a * dot_to;
        }
        if (hard) {
          const A x_s = call.reverse ? x[i] : y[i], w_s = call.reverse ? wx[i] : wy[i];
          const A added = of_hard * exp_of(x_s - max_s) * (w_s - sums.hard_dot);
          if (call.reverse) into_from += added;
          else into_to += added;
        }
        out_from.x[i] = static_cast<T>(into_from), out_to.x[i] = static_cast<T>(into_to);
      }
    }
    if (h_from != nullptr) store(h_from, chunks, first, out_from);
    if (h_to != nullptr) store(h_to, chunks, first, out_to);
  }
  if (call.h_tau_s == nullptr && call.h_tau_t == nullptr) return;
  group.reduce(ends, [](Ends<A>& s, int lanes) {
    s.from = sum_over(s.from, lanes), s.from_dot = sum_over(s.from_dot, lanes);
    s.to = sum_over(s.to, lanes), s.to_dot = sum_over(s.to_dot, lanes);
  });
  if (group.lane != 0 || !exists) return;
  const A inner_from = by_from.of_gradient * ends.from + by_from.of_change * ends.from_dot;
  const A inner_to = by_to.of_gradient * ends.to + by_to.of_change * ends.to_dot;
  const A on_s = factor * (c.by_s_dot * d + c.by_s * d_dot) - (call.reverse ? inner_from : inner_to);
  const A on_t = factor * (c.by_t_dot * d + c.by_t * d_dot) - (call.reverse ? inner_to : inner_from);
  if (call.h_tau_s != nullptr) call.h_tau_s[row] = counts && soft ? on_s : counts ? A(0) * coefficient : A(0);
  if (call.h_tau_t != nullptr) call.h_tau_t[row] = counts && soft ? on_t : counts ? A(0) * coefficient : A(0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kd_kl_hvp(
    Tensor student, Tensor teacher, OptionalTensor student_temperature, OptionalTensor teacher_temperature,
    OptionalTensor labels, OptionalTensor target, OptionalTensor weight, OptionalTensor w_student,
    OptionalTensor w_teacher, OptionalTensor w_tau_s, OptionalTensor w_tau_t, double tau_s, double tau_t, double alpha,
    double label_smoothing, int64_t ignore_index, int64_t divergence, int64_t scale, double /*beta*/,
    double /*target_weight*/, double softcap, double logit_scale, bool student_wanted, bool teacher_wanted) {
  STD_TORCH_CHECK(divergence <= 2 && softcap == 0 && logit_scale == 1, "kd_kl_hvp: forward_kl, reverse_kl or soft_ce");
  STD_TORCH_CHECK(student.size(1) < (int64_t(1) << 30), "kd_kl_hvp: more than 2^30 classes");
  const ScalarType type = student.scalar_type(), sum_type = accumulate_type(type);
  const int64_t n = student.size(0), classes = student.size(1);
  const auto product = [&](bool wanted) {
    return wanted ? empty(student, {n, classes}, type) : empty(student, {0}, type);
  };
  const auto per_row = [&](bool wanted) { return empty(student, {wanted ? n : 0}, sum_type); };
  Tensor h_student = product(student_wanted), h_teacher = product(teacher_wanted);
  Tensor h_tau_s = per_row(student_temperature.has_value()), h_tau_t = per_row(teacher_temperature.has_value());
  if (n == 0) return {h_student, h_teacher, h_tau_s, h_tau_t};
  with_types(type, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const auto side = [](const Tensor& x, const OptionalTensor& w, const Tensor& h) {
      return Side<T>{static_cast<const T*>(x.data_ptr()), data_or_null<T>(w), result_or_null<T>(h)};
    };
    HvpCall<T, A> call{side(student, w_student, h_student), side(teacher, w_teacher, h_teacher),
                       column_of<A>(student_temperature), column_of<A>(teacher_temperature),
                       column_of<A>(w_tau_s), column_of<A>(w_tau_t), column_of<int64_t>(labels),
                       alpha > 0 ? data_or_null<A>(target) : nullptr, column_of<A>(weight),
                       result_or_null<A>(h_tau_s), result_or_null<A>(h_tau_t), A(tau_s), A(tau_t), A(alpha),
                       A(label_smoothing), A(divergence == 2 ? 0 : 1), n, ignore_index, static_cast<int>(classes), 0,
                       static_cast<int>(scale), true, divergence == 1};
    const auto on_chunks = [](const Side<T>& s) { return on_chunk(s.x) && on_chunk(s.w) && on_chunk(s.h); };
    call.aligned = on_chunks(call.student) && on_chunks(call.teacher) && on_chunk(call.target);
    const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
    const cudaStream_t stream = current_stream(student.get_device_index());
    const int chunks = most_chunks<T>(call.classes);
    if (classes <= 1024) {  // lanes of a warp share a row, several rows a block; above, a block has it
      call.lanes = std::min(kWarp, power_of_two_at_least(chunks));
      const int rows_a_block = kLanesThreads / call.lanes;
      hvp<T, A, LaneGroup><<<grid_of((n + rows_a_block - 1) / rows_a_block), kLanesThreads, 0, stream>>>(call);
    } else {
      const int threads = std::clamp(power_of_two_at_least(chunks / 4), kLanesThreads, kBlockThreads);
      hvp<T, A, BlockGroup><<<grid_of(n), threads, 0, stream>>>(call);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {h_student, h_teacher, h_tau_s, h_tau_t};
}

}  // namespace
}  // namespace kdfast::cuda

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) { m.impl("kd_kl_hvp", TORCH_BOX(&kdfast::cuda::kd_kl_hvp)); }
