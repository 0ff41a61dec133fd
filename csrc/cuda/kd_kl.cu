// kd_kl's ops on CUDA: tensors to pointers, and which launchers (kd_kl_launch.h) a call wants.
#include <algorithm>
#include <limits>

#include "../math/kd_kl.h"
#include "../stable.h"
#include "kd_kl_launch.h"
#include "launch.h"
#include "rows.cuh"

namespace kdfast::cuda {
namespace {

using kd_kl::kStats;

struct Inputs {
  Tensor student, teacher;                                      // [rows, classes]
  OptionalTensor student_temperature, teacher_temperature;      // [1] or [rows]
  OptionalTensor labels, target, weight;                        // [rows], [rows, classes], [rows]
  double tau_s, tau_t, alpha, label_smoothing;
  int64_t ignore_index, divergence, scale;
  double beta, target_weight, softcap, logit_scale;
};

Request::Column column(const OptionalTensor& x) {
  if (!x.has_value()) return {nullptr, 0};
  return {x->data_ptr(), x->numel() == 1 ? 0 : x->stride(0)};
}

Storage storage_of(const Tensor& student) {
  switch (student.scalar_type()) {
    case ScalarType::Float: return kFloat;
    case ScalarType::Double: return kDouble;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kHalf;
    default: STD_TORCH_CHECK(false, "kd_kl: logits must be fp64, fp32, bf16 or fp16");
  }
}

// The call's inputs; its outputs are set by who makes them. To be used under a DeviceGuard.
Request request_of(const Inputs& in) {
  STD_TORCH_CHECK(in.student.size(1) < (int64_t(1) << 30), "kd_kl: more than 2^30 classes");
  STD_TORCH_CHECK(in.student.size(0) <= std::numeric_limits<int32_t>::max(), "kd_kl: too many rows for one launch");
  Request r{};
  r.student = in.student.data_ptr(), r.teacher = in.teacher.data_ptr();
  r.student_temperature = column(in.student_temperature);
  r.teacher_temperature = column(in.teacher_temperature);
  r.labels = column(in.labels), r.weight = column(in.weight);
  r.target = in.target.has_value() ? in.target->data_ptr() : nullptr;
  r.tau_s = in.tau_s, r.tau_t = in.tau_t, r.alpha = in.alpha, r.label_smoothing = in.label_smoothing;
  r.ignore_index = in.ignore_index;
  r.divergence = static_cast<int>(in.divergence), r.scale = static_cast<int>(in.scale);
  r.beta = in.beta, r.target_weight = in.target_weight;
  r.softcap = in.softcap, r.logit_scale = in.logit_scale;
  r.storage = storage_of(in.student);
  r.rows = in.student.size(0), r.classes = static_cast<int>(in.student.size(1));
  r.device = in.student.get_device_index(), r.stream = current_stream(r.device);
  return r;
}

// With alpha = 1 no divergence is left, and a KL's kernels do.
template <class Use>
auto with_launch(const Request& r, const Use& use) {
  if (r.alpha < 1 && r.divergence == kd_kl::kJSD) return use(Launch<kJsd, true>{});
  if (r.alpha < 1 && r.divergence == kd_kl::kDKD) return use(Launch<kDkd, true>{});
  if (r.softcap > 0 || r.logit_scale != 1) return use(Launch<kKl, true>{});
  return use(Launch<kKl, false>{});
}

void run_forward(const Inputs& in, Request& request) {
  with_launch(request, [&](auto launch) {
    const int64_t parts = launch.forward_parts(request);
    const ScalarType type = accumulate_type(in.student.scalar_type());
    const Tensor workspace = empty(in.student, {parts > 1 ? request.rows * parts * kPart : 0}, type);
    request.parts = workspace.data_ptr();
    check(launch.forward(request), "kd_kl");
  });
}

std::tuple<Tensor, Tensor> kd_kl_forward(
    Tensor student, Tensor teacher, OptionalTensor student_temperature, OptionalTensor teacher_temperature,
    OptionalTensor labels, OptionalTensor target, OptionalTensor weight, double tau_s, double tau_t,
    double alpha, double label_smoothing, int64_t ignore_index, int64_t divergence, int64_t scale,
    double beta, double target_weight, double softcap, double logit_scale, bool temperature_grad) {
  const Inputs in{student, teacher, student_temperature, teacher_temperature, labels, target, weight, tau_s, tau_t,
                  alpha, label_smoothing, ignore_index, divergence, scale, beta, target_weight, softcap, logit_scale};
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const ScalarType type = accumulate_type(student.scalar_type());
  Tensor loss = empty(student, {student.size(0)}, type);
  Tensor stats = empty(student, {student.size(0), kStats}, type);
  Request request = request_of(in);
  request.loss = loss.data_ptr(), request.stats = stats.data_ptr();
  request.temperature_grad = temperature_grad;
  if (request.rows > 0) run_forward(in, request);
  return {loss, stats};
}

std::tuple<Tensor, Tensor> kd_kl_backward(
    Tensor grad, Tensor student, Tensor teacher, OptionalTensor student_temperature,
    OptionalTensor teacher_temperature, OptionalTensor labels, OptionalTensor target, OptionalTensor weight,
    Tensor stats, double tau_s, double tau_t, double alpha, double label_smoothing, int64_t ignore_index,
    int64_t divergence, int64_t scale, double beta, double target_weight, double softcap, double logit_scale,
    bool student_grad, bool teacher_grad) {
  const Inputs in{student, teacher, student_temperature, teacher_temperature, labels, target, weight, tau_s, tau_t,
                  alpha, label_smoothing, ignore_index, divergence, scale, beta, target_weight, softcap, logit_scale};
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const auto gradient = [&](bool wanted) {
    const ScalarType type = student.scalar_type();
    return wanted ? empty(student, {student.size(0), student.size(1)}, type) : empty(student, {0}, type);
  };
  Tensor ds = gradient(student_grad), dt = gradient(teacher_grad);
  Request request = request_of(in);
  request.grad = column(grad);
  request.stats = stats.data_ptr();
  request.student_grad = student_grad ? ds.data_ptr() : nullptr;
  request.teacher_grad = teacher_grad ? dt.data_ptr() : nullptr;
  if (request.rows > 0) with_launch(request, [&](auto launch) { check(launch.backward(request), "kd_kl"); });
  return {ds, dt};
}

// ---------------------------------------------------------------- value_and_grad
// coefficient * sum of the losses, by one block in one order.
template <class A>
__global__ void __launch_bounds__(1024) scaled_sum(const A* losses, int64_t rows, A coefficient, A* out) {
  const BlockGroup group(0);
  double sum = 0;
  for (int64_t i = group.lane; i < rows; i += group.lanes) sum += losses[i];
  group.reduce(sum, [](double& x, int lanes) { x = sum_over(x, lanes); });
  if (group.lane == 0) *out = static_cast<A>(coefficient * sum);
}

template <class A>
void launch_sum(const Request& r, void* out) {
  scaled_sum<<<1, 1024, 0, r.stream>>>(static_cast<const A*>(r.loss), r.rows, static_cast<A>(r.coefficient),
                                       static_cast<A*>(out));
  check(cudaGetLastError(), "kd_kl");
}

// In one sweep of memory where a row fits on chip, else as forward and backward.
std::tuple<Tensor, Tensor, Tensor> kd_kl_value_and_grad(
    Tensor student, Tensor teacher, OptionalTensor student_temperature, OptionalTensor teacher_temperature,
    OptionalTensor labels, OptionalTensor target, OptionalTensor weight, double tau_s, double tau_t,
    double alpha, double label_smoothing, int64_t ignore_index, int64_t divergence, int64_t scale,
    double beta, double target_weight, double softcap, double logit_scale, bool temperature_grad,
    double coefficient) {
  const Inputs in{student, teacher, student_temperature, teacher_temperature, labels, target, weight, tau_s, tau_t,
                  alpha, label_smoothing, ignore_index, divergence, scale, beta, target_weight, softcap, logit_scale};
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const ScalarType type = accumulate_type(student.scalar_type());
  const Tensor losses = empty(student, {student.size(0)}, type);
  Tensor stats = empty(student, {student.size(0), kStats}, type);
  Tensor student_grad = empty(student, {student.size(0), student.size(1)}, student.scalar_type());
  Tensor loss = empty(student, {}, type);
  Request request = request_of(in);
  request.loss = losses.data_ptr(), request.stats = stats.data_ptr();
  request.student_grad = student_grad.data_ptr();
  request.coefficient = coefficient, request.temperature_grad = temperature_grad;
  if (request.rows > 0) {
    with_launch(request, [&](auto launch) {
      const cudaError_t error = launch.value_and_grad(request);
      if (error != cudaErrorNotSupported) return check(error, "kd_kl");
      run_forward(in, request);
      check(launch.backward(request), "kd_kl");
    });
  }
  if (type == ScalarType::Double) launch_sum<double>(request, loss.data_ptr());
  else launch_sum<float>(request, loss.data_ptr());
  return {loss, stats, student_grad};
}

// The gradient that value_and_grad made, times the incoming one, a number on the GPU. That is 1 where the loss is
// what backward() was called on: then a launch that reads one number is all, and no host waited to know it.
template <class T, class A>
__global__ void __launch_bounds__(256) scale_unless_one(T* x, int64_t count, const A* factor) {
  const A by = *factor;
  if (by == A(1)) return;
  constexpr int N = kChunk<T>;  // the tensor is new, so its chunks lie at 16-byte boundaries
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t chunk = thread; chunk < count / N; chunk += threads) {
    Vector<T> v = reinterpret_cast<const Vector<T>*>(x)[chunk];
#pragma unroll
    for (int i = 0; i < N; ++i) v.x[i] = static_cast<T>(by * static_cast<A>(v.x[i]));
    __stwb(reinterpret_cast<uint4*>(x) + chunk, Slots<T>::bits(v));
  }
  const int64_t rest = count / N * N + thread;
  if (rest < count) x[rest] = static_cast<T>(by * static_cast<A>(x[rest]));
}

void kd_kl_scale_(Tensor gradient, Tensor factor) {
  const torch::stable::accelerator::DeviceGuard guard(gradient.get_device_index());
  const cudaStream_t stream = current_stream(gradient.get_device_index());
  const int64_t count = gradient.numel();
  if (count == 0) return;
  constexpr int64_t kEnough = 4096;  // blocks that fill the largest GPUs
  const unsigned blocks = static_cast<unsigned>(std::min(kEnough, count / 2048 + 1));
  const auto scale = [&](auto* x, auto* by) {
    scale_unless_one<<<blocks, 256, 0, stream>>>(x, count, by);
    check(cudaGetLastError(), "kd_kl");
  };
  void* x = gradient.data_ptr();
  const float* by = static_cast<const float*>(factor.data_ptr());
  switch (storage_of(gradient)) {
    case kFloat: return scale(static_cast<float*>(x), by);
    case kDouble: return scale(static_cast<double*>(x), static_cast<const double*>(factor.data_ptr()));
    case kBFloat16: return scale(static_cast<__nv_bfloat16*>(x), by);
    case kHalf: return scale(static_cast<__half*>(x), by);
  }
}

}  // namespace
}  // namespace kdfast::cuda

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("kd_kl", TORCH_BOX(&kdfast::cuda::kd_kl_forward));
  m.impl("kd_kl_backward", TORCH_BOX(&kdfast::cuda::kd_kl_backward));
  m.impl("kd_kl_value_and_grad", TORCH_BOX(&kdfast::cuda::kd_kl_value_and_grad));
  m.impl("kd_kl_scale_", TORCH_BOX(&kdfast::cuda::kd_kl_scale_));
}
