// Launchers of kd_kl's CUDA kernels, which stand in kd_kl.cuh, and their registration.
#include <algorithm>
#include <limits>

#include "../stable.h"
#include "kd_kl.cuh"

namespace kdfast::cuda {
namespace {

struct Inputs {
  Tensor student, teacher;                                      // [rows, classes]
  OptionalTensor student_temperature, teacher_temperature;      // [1] or [rows]
  OptionalTensor labels, target, weight;                        // [rows], [rows, classes], [rows]
  double tau_s, tau_t, alpha, label_smoothing;
  int64_t ignore_index, divergence, scale;
  double beta, target_weight, softcap, logit_scale;
};

template <class T>
Column<T> column(const OptionalTensor& x) {
  if (!x.has_value()) return {nullptr, 0};
  return {static_cast<const T*>(x->data_ptr()), x->numel() == 1 ? 0 : x->stride(0)};
}

template <class T>
T* output(const Tensor& x, bool wanted) {
  return wanted ? static_cast<T*>(x.data_ptr()) : nullptr;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }  // null is

template <class T, class A>
Call<T, A> make_call(const Inputs& in) {
  STD_TORCH_CHECK(in.student.size(1) < (int64_t(1) << 30), "kd_kl: more than 2^30 classes");
  Call<T, A> call{};
  call.student = static_cast<const T*>(in.student.data_ptr());
  call.teacher = static_cast<const T*>(in.teacher.data_ptr());
  call.student_temperature = column<A>(in.student_temperature);
  call.teacher_temperature = column<A>(in.teacher_temperature);
  call.labels = column<int64_t>(in.labels);
  call.target = data_or_null<A>(in.target);
  call.weight = column<A>(in.weight);
  call.options = make_options<A>(in.tau_s, in.tau_t, in.alpha, in.label_smoothing, in.ignore_index,
                                 static_cast<int>(in.divergence), static_cast<int>(in.scale));
  call.rows = in.student.size(0);
  call.classes = static_cast<int>(in.student.size(1));
  return call;
}

unsigned blocks(int64_t n) {
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "kd_kl: too many rows for one launch");
  return static_cast<unsigned>(n);
}

int power_of_two_from(int x) {
  int p = 1;
  while (p < x) p *= 2;
  return p;
}

// Runs `narrow` or `wide` over all rows. Where `divisible` and rows are few, a wide row is cut over several
// blocks.
template <class T, class A>
void launch(Call<T, A> call, void (*narrow)(Call<T, A>), void (*wide)(Call<T, A>), bool divisible,
            int32_t device) {
  if (call.rows == 0) return;
  call.aligned = is_aligned(call.student) && is_aligned(call.teacher) && is_aligned(call.target) &&
                 is_aligned(call.student_grad) && is_aligned(call.teacher_grad);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const int chunks = call.classes / kChunk<T> + (call.classes % kChunk<T> == 0 ? 0 : 2);  // at most
  if (call.classes <= kNarrow) {
    call.lanes = std::min(kWarp, power_of_two_from(chunks));
    const int rows_a_block = kNarrowThreads / call.lanes;
    narrow<<<blocks((call.rows + rows_a_block - 1) / rows_a_block), kNarrowThreads, 0, stream>>>(call);
  } else {
    const int threads = std::clamp(power_of_two_from(chunks / 8), kNarrowThreads, kWideThreads<A>);
    constexpr int64_t kEnough = 1024;  // blocks that fill the largest GPUs
    const int64_t parts = std::min<int64_t>(kEnough / call.rows, chunks / threads);
    const dim3 grid(blocks(call.rows), divisible ? static_cast<unsigned>(std::max<int64_t>(1, parts)) : 1u);
    wide<<<grid, threads, 0, stream>>>(call);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class F>
void dispatch(const Tensor& student, const F& f) {
  switch (student.scalar_type()) {
    case ScalarType::Float: return f(Call<float, float>{});
    case ScalarType::Double: return f(Call<double, double>{});
    case ScalarType::BFloat16: return f(Call<__nv_bfloat16, float>{});
    case ScalarType::Half: return f(Call<__half, float>{});
    default: STD_TORCH_CHECK(false, "kd_kl: logits must be fp64, fp32, bf16 or fp16");
  }
}

std::tuple<Tensor, Tensor> kd_kl_forward(
    Tensor student, Tensor teacher, OptionalTensor student_temperature, OptionalTensor teacher_temperature,
    OptionalTensor labels, OptionalTensor target, OptionalTensor weight, double tau_s, double tau_t,
    double alpha, double label_smoothing, int64_t ignore_index, int64_t divergence, int64_t scale,
    double beta, double target_weight, double softcap, double logit_scale, bool temperature_grad) {
  const Inputs in{student, teacher, student_temperature, teacher_temperature, labels, target, weight,
                  tau_s, tau_t, alpha, label_smoothing, ignore_index, divergence, scale, beta, target_weight, softcap, logit_scale};
  const int64_t rows = student.size(0);
  const ScalarType type = accumulate_type(student.scalar_type());
  Tensor loss = empty(student, {rows}, type);
  Tensor stats = empty(student, {rows, kStats}, type);
  dispatch(student, [&](auto empty_call) {
    using C = decltype(empty_call);
    using T = typename C::Storage;
    using A = typename C::Sum;
    C call = make_call<T, A>(in);
    call.loss = static_cast<A*>(loss.data_ptr());
    call.stats = static_cast<A*>(stats.data_ptr());
    call.temperature_grad = temperature_grad;
    launch(call, forward<T, A, LaneGroup>, forward<T, A, BlockGroup>, false, student.get_device_index());
  });
  return {loss, stats};
}

std::tuple<Tensor, Tensor> kd_kl_backward(
    Tensor grad, Tensor student, Tensor teacher, OptionalTensor student_temperature,
    OptionalTensor teacher_temperature, OptionalTensor labels, OptionalTensor target, OptionalTensor weight,
    Tensor stats, double tau_s, double tau_t, double alpha, double label_smoothing, int64_t ignore_index,
    int64_t divergence, int64_t scale,
    double beta, double target_weight, double softcap, double logit_scale, bool student_grad, bool teacher_grad) {
  const Inputs in{student, teacher, student_temperature, teacher_temperature, labels, target, weight,
                  tau_s, tau_t, alpha, label_smoothing, ignore_index, divergence, scale, beta, target_weight, softcap, logit_scale};
  const int64_t rows = student.size(0), classes = student.size(1);
  const auto gradient = [&](bool wanted) {
    const ScalarType type = student.scalar_type();
    return wanted ? empty(student, {rows, classes}, type) : empty(student, {0}, type);
  };
  Tensor ds = gradient(student_grad), dt = gradient(teacher_grad);
  dispatch(student, [&](auto empty_call) {
    using C = decltype(empty_call);
    using T = typename C::Storage;
    using A = typename C::Sum;
    C call = make_call<T, A>(in);
    call.grad = column<A>(grad);
    call.stats = static_cast<A*>(stats.data_ptr());
    call.student_grad = output<T>(ds, student_grad);
    call.teacher_grad = output<T>(dt, teacher_grad);
    const bool sums_first = call.options.hard && (call.target != nullptr || call.options.smoothing > A(0));
    launch(call, backward<T, A, LaneGroup>, backward<T, A, BlockGroup>, !sums_first,
           student.get_device_index());
  });
  return {ds, dt};
}

}  // namespace
}  // namespace kdfast::cuda

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("kd_kl", TORCH_BOX(&kdfast::cuda::kd_kl_forward));
  m.impl("kd_kl_backward", TORCH_BOX(&kdfast::cuda::kd_kl_backward));
}
