// kd_kl_topk on the GPU: KL to a teacher known by k classes and a tail. Formulas: ../math/kd_kl_topk.h.
//
//   loss = w tau^2 [ sum_listed p (log p - log q) + p_tail (log p_tail - log q_tail) ]
//
// Fused: the softmax, the tail's sums, the divergence, its gradients. A block has a row. Forward streams the row once:
// a bit a class in shared memory, 65,536 classes at a time, says which are listed, so that the tail is summed directly.
// Backward is elementwise, every class taken as tail, and then the k listed ones, by the same block.
// Memory for a row of C classes of b bytes: forward reads C b, backward reads and writes C b: 3 passes over
// [rows, classes]; and 12 k bytes a row each.
// Source: docs/math/kd_kl_topk.md.
#include "../math/kd_kl_topk.h"
#include "launch.h"

namespace kdfast::cuda {
namespace {

namespace topk = kdfast::kd_kl_topk;

constexpr int kThreads = 512, kFewestThreads = 64;
constexpr int kSection = 65536;  // classes whose bits stand in shared memory at a time: 8 KB

template <class T, class A>
struct TopkCall {
  const T* student;             // [rows, classes]
  const A* log_probs;           // [rows, k]
  const int64_t* indices;       // [rows, k]
  Column<A> tau, weight, grad;  // [1] or [rows], or null
  Column<int64_t> labels;       // [rows], or null
  A *loss, *stats;              // [rows], [rows, kStats]
  T* ds;                        // [rows, classes], or null
  A constant_tau;
  int64_t ignore_index;
  int classes, k;
  bool aligned, temperature_grad;
};

template <class A>
__device__ A value_of(const Column<A>& column, int64_t row, A otherwise) {
  return column.data == nullptr ? otherwise : column.at(row);
}
template <class A>
__device__ A exp_of(A x) {
  return exp2_of(A(kLog2e) * x);
}

template <class A>
struct Listed {
  OnlineSoftmax<A> softmax;
  A likeliest = -kInfinity<A>, outside = 0;
};
template <class A>
struct Teacher {
  A ties = 0, others = 0, entropy = 0;  // classes as likely as the likeliest; sums over the others, over all
};
template <class A>
struct Tail {
  OnlineSoftmax<A> softmax;
  A dot = 0;  // sum of e y, y the distance from the maximum in units of log 2 tau

  __device__ void raise(A max, A k) {
    const A before = softmax.sum;
    const auto change = softmax.raise(max, k);
    dot = change.factor == A(0) ? A(0) : change.factor * (dot - before * change.distance);
  }
};
template <class A>
struct Divergence {
  A value = 0, inner = 0;
};

template <class T, class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 2 : 1) topk_forward(const TopkCall<T, A> call) {
  constexpr int N = kChunk<T>, kChunksASection = kSection / N;
  __shared__ unsigned listed_bits[kSection / 32];
  const BlockGroup group(0);
  const int64_t row = group.row();
  const T* student = call.student + row * call.classes;
  const A* log_probs = call.log_probs + row * call.k;
  const int64_t* indices = call.indices + row * call.k;
  A* const stats = call.stats + row * topk::kStats;
  if (call.labels.data != nullptr && call.labels.at(row) == call.ignore_index) {  // the whole block
    if (group.lane == 0) call.loss[row] = A(0);
    if (group.lane < topk::kStats) stats[group.lane] = A(0);
    return;
  }
  const A tau = value_of(call.tau, row, call.constant_tau), per_tau = A(1) / tau, unit = A(kLog2e) * per_tau;
  const auto inside = [&](int64_t j) { return j >= 0 && j < call.classes; };

  Listed<A> listed;
  for (int i = group.lane; i < call.k; i += group.lanes) {
    const int64_t j = indices[i];
    listed.outside += inside(j) ? A(0) : A(1);
    listed.likeliest = larger(listed.likeliest, log_probs[i]);
    const A x = inside(j) ? static_cast<A>(student[j]) : -kInfinity<A>;
    listed.softmax.raise(x, unit);
    listed.softmax.sum += exp2_of(unit * (x - base_of(listed.softmax.max)));
  }
  group.reduce(listed, [&](Listed<A>& s, int lanes) {
    s.softmax.raise(max_over(s.softmax.max, lanes), unit);
    s.softmax.sum = sum_over(s.softmax.sum, lanes);
    s.likeliest = max_over(s.likeliest, lanes), s.outside = sum_over(s.outside, lanes);
  });
  Teacher<A> teacher;
  for (int i = group.lane; i < call.k; i += group.lanes) {
    const A log_p = log_probs[i], p = ::exp(log_p);
    teacher.ties += log_p == listed.likeliest ? A(1) : A(0);
    teacher.others += log_p == listed.likeliest ? A(0) : p;
    teacher.entropy -= p == A(0) ? A(0) : p * log_p;
  }
  group.reduce(teacher, [](Teacher<A>& s, int lanes) {
    s.ties = sum_over(s.ties, lanes), s.others = sum_over(s.others, lanes), s.entropy = sum_over(s.entropy, lanes);
  });

  const Chunks<N> chunks(row, call.classes, call.aligned);
  const T masked = static_cast<T>(-kInfinity<A>);  // stands outside the row: a masked class adds nothing
  Tail<A> tail;
  for (int from = 0; from < chunks.count; from += kChunksASection) {
    const int first_column = chunks.first(from), to = min(chunks.count, from + kChunksASection);
    __syncthreads();  // the section before is done with the bits
    for (int i = group.lane; i < ((to - from) * N + 31) / 32; i += group.lanes) listed_bits[i] = 0;
    __syncthreads();
    for (int i = group.lane; i < call.k; i += group.lanes) {
      const int64_t at = indices[i] - first_column;
      if (inside(indices[i]) && at >= 0 && at < (to - from) * N) atomicOr(&listed_bits[at / 32], 1u << (at % 32));
    }
    __syncthreads();
    for (int chunk = from + group.lane; chunk < to; chunk += group.lanes) {
      A x[N];
      widen(load(student, chunks, chunks.first(chunk), masked), x);
      const int at = (chunk - from) * N;
      const unsigned bits = listed_bits[at / 32] >> (at % 32);
      A max = tail.softmax.max;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (bits >> i & 1u) x[i] = -kInfinity<A>;
        max = larger(max, x[i]);
      }
      tail.raise(max, unit);
      const A base = base_of(max);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A y = unit * (x[i] - base), e = exp2_of(y);
        tail.softmax.sum += e;
        tail.dot += e == A(0) ? A(0) : e * y;
      }
    }
  }
  group.reduce(tail, [&](Tail<A>& s, int lanes) {
    s.raise(max_over(s.softmax.max, lanes), unit);
    s.softmax.sum = sum_over(s.softmax.sum, lanes), s.dot = sum_over(s.dot, lanes);
  });

  const A others = teacher.others + (teacher.ties - A(1)) * ::exp(listed.likeliest);
  const A p_tail = call.k == call.classes ? A(0) : topk::tail_probability<A, A>(listed.likeliest, others, teacher.entropy);
  const auto r = topk::row_of(topk::Part<A>{listed.softmax.max, listed.softmax.sum},
                              topk::Part<A>{tail.softmax.max, tail.softmax.sum}, per_tau, p_tail);
  Divergence<A> d;
  for (int i = group.lane; i < call.k; i += group.lanes) {
    const int64_t j = indices[i];
    if (!inside(j)) continue;
    const A u = (static_cast<A>(student[j]) - r.max) * per_tau, log_q = u - r.log_z, log_p = log_probs[i], p = ::exp(log_p);
    d.value += p == A(0) ? A(0) : p * (log_p - log_q);
    d.inner += u == -kInfinity<A> ? A(0) : (exp_of(log_q) - p) * u;
  }
  group.reduce(d, [](Divergence<A>& s, int lanes) {
    s.value = sum_over(s.value, lanes), s.inner = sum_over(s.inner, lanes);
  });
  if (group.lane != 0) return;
  if (tail.softmax.sum > A(0)) {
    d.inner += r.g * (A(kLn2) * tail.dot + tail.softmax.sum * ((tail.softmax.max - r.max) * per_tau));
  }
  d.value += topk::tail_divergence(r);
  const A poison = listed.outside > A(0) ? A(NAN) : A(0);  // an index that is no class
  const A weight = value_of(call.weight, row, A(1)) + poison;
  call.loss[row] = weight * tau * tau * d.value;
  stats[topk::kMax] = r.max + poison, stats[topk::kLogZ] = r.log_z + poison;
  stats[topk::kMaxTail] = r.max_tail, stats[topk::kG] = r.g + poison;
  stats[topk::kGradTau] = call.temperature_grad ? weight * tau * (A(2) * d.value - d.inner) : A(0);
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 2 : 1) topk_backward(const TopkCall<T, A> call) {
  constexpr int N = kChunk<T>;
  const BlockGroup group(0);
  const int64_t row = group.row();
  const A* stats = call.stats + row * topk::kStats;
  const T* student = call.student + row * call.classes;
  T* const ds = call.ds + row * call.classes;
  const bool counts = call.labels.data == nullptr || call.labels.at(row) != call.ignore_index;
  const A tau = value_of(call.tau, row, call.constant_tau), per_tau = A(1) / tau;
  const A factor = call.grad.at(row) * value_of(call.weight, row, A(1)) * tau;
  const A base = base_of(stats[topk::kMaxTail]), g = factor * stats[topk::kG], unit = A(kLog2e) * per_tau;
  const Chunks<N> chunks(row, call.classes, call.aligned);
  for (int chunk = group.lane; chunk < chunks.count; chunk += group.lanes) {
    Vector<T> out{};
    if (counts) {  // an ignored row has gradient 0, whatever its logits hold
      A x[N];
      widen(load(student, chunks, chunks.first(chunk), static_cast<T>(-kInfinity<A>)), x);
#pragma unroll
      for (int i = 0; i < N; ++i) out.x[i] = static_cast<T>(g * exp2_of(unit * (x[i] - base)));
    }
    store(ds, chunks, chunks.first(chunk), out);
  }
  if (!counts) return;  // the whole block
  __syncthreads();      // what was written as tail is written again
  for (int i = group.lane; i < call.k; i += group.lanes) {
    const int64_t j = call.indices[row * call.k + i];
    if (j < 0 || j >= call.classes) continue;  // and the row is NaN by its statistics
    const A u = (static_cast<A>(student[j]) - stats[topk::kMax]) * per_tau;
    ds[j] = static_cast<T>(factor * (exp_of(u - stats[topk::kLogZ]) - ::exp(call.log_probs[row * call.k + i])));
  }
}

template <class T, class A>
TopkCall<T, A> call_of(const Tensor& student, const Tensor& log_probs, const Tensor& indices, const OptionalTensor& tau,
                       const OptionalTensor& labels, const OptionalTensor& weight, const Tensor& stats, double tau_s,
                       int64_t ignore_index) {
  STD_TORCH_CHECK(student.size(1) < (int64_t(1) << 30), "kd_kl_topk: more than 2^30 classes");
  TopkCall<T, A> call{};
  call.student = static_cast<const T*>(student.data_ptr());
  call.log_probs = static_cast<const A*>(log_probs.data_ptr());
  call.indices = static_cast<const int64_t*>(indices.data_ptr());
  call.tau = column_of<A>(tau), call.weight = column_of<A>(weight), call.labels = column_of<int64_t>(labels);
  call.stats = static_cast<A*>(stats.data_ptr());
  call.constant_tau = A(tau_s), call.ignore_index = ignore_index;
  call.classes = static_cast<int>(student.size(1)), call.k = static_cast<int>(indices.size(1));
  return call;
}

template <class T, class A>
void launch(TopkCall<T, A> call, void (*kernel)(TopkCall<T, A>), int64_t rows, int32_t device) {
  if (rows == 0) return;
  call.aligned = on_chunk(call.student) && on_chunk(call.ds);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int threads = std::clamp(power_of_two_at_least(most_chunks<T>(call.classes) / 4), kFewestThreads, kThreads);
  kernel<<<grid_of(rows), threads, 0, current_stream(device)>>>(call);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> kd_kl_topk(Tensor student, Tensor log_probs, Tensor indices, OptionalTensor student_temperature,
                                      OptionalTensor labels, OptionalTensor weight, double tau_s, int64_t ignore_index,
                                      bool temperature_grad) {
  const int64_t rows = student.size(0);
  Tensor loss = empty(student, {rows}, accumulate_type(student.scalar_type()));
  Tensor stats = empty(student, {rows, topk::kStats}, loss.scalar_type());
  with_types(student.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    auto call = call_of<T, A>(student, log_probs, indices, student_temperature, labels, weight, stats, tau_s, ignore_index);
    call.loss = static_cast<A*>(loss.data_ptr());
    call.temperature_grad = temperature_grad;
    launch(call, topk_forward<T, A>, rows, student.get_device_index());
  });
  return {loss, stats};
}

Tensor kd_kl_topk_backward(Tensor grad, Tensor student, Tensor log_probs, Tensor indices, OptionalTensor student_temperature,
                           OptionalTensor labels, OptionalTensor weight, Tensor stats, double tau_s, int64_t ignore_index) {
  Tensor ds = empty(student, {student.size(0), student.size(1)}, student.scalar_type());
  with_types(student.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    auto call = call_of<T, A>(student, log_probs, indices, student_temperature, labels, weight, stats, tau_s, ignore_index);
    call.grad = column_of<A>(grad);
    call.ds = static_cast<T*>(ds.data_ptr());
    launch(call, topk_backward<T, A>, student.size(0), student.get_device_index());
  });
  return ds;
}

}  // namespace
}  // namespace kdfast::cuda

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("kd_kl_topk", TORCH_BOX(&kdfast::cuda::kd_kl_topk));
  m.impl("kd_kl_topk_backward", TORCH_BOX(&kdfast::cuda::kd_kl_topk_backward));
}
