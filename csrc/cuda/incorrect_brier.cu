// Launchers of incorrect_brier's CUDA kernels, which stand in incorrect_brier.cuh, and their registration.
#include <algorithm>
#include <limits>

#include "../stable.h"
#include "incorrect_brier.cuh"

namespace kdfast::cuda::brier {
namespace {

unsigned blocks(int64_t n) {
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "incorrect_brier: too many rows for one launch");
  return static_cast<unsigned>(n);
}

int power_of_two_from(int x) {
  int p = 1;
  while (p < x) p *= 2;
  return p;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }  // null is

// Runs `narrow` or `wide` over all rows. Where `divisible` and rows are few, a wide row is cut over several blocks.
template <class T, class A>
void launch(Call<T, A> call, void (*narrow)(Call<T, A>), void (*wide)(Call<T, A>), bool divisible, int32_t device) {
  if (call.rows == 0) return;
  call.aligned = is_aligned(call.logits) && is_aligned(call.target) && is_aligned(call.gradient);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const int chunks = call.classes / kChunk<T> + (call.classes % kChunk<T> == 0 ? 0 : 2);  // at most
  if (call.classes <= kNarrow) {
    call.lanes = std::min(kWarp, power_of_two_from(chunks));
    const int rows_a_block = kNarrowThreads / call.lanes;
    narrow<<<blocks((call.rows + rows_a_block - 1) / rows_a_block), kNarrowThreads, 0, stream>>>(call);
  } else {
    const int threads = std::clamp(power_of_two_from(chunks / 8), kNarrowThreads, kWideThreads);
    constexpr int64_t kEnough = 1024;  // blocks that fill the largest GPUs
    const int64_t parts = std::min<int64_t>(kEnough / call.rows, chunks / threads);
    const dim3 grid(blocks(call.rows), divisible ? static_cast<unsigned>(std::max<int64_t>(1, parts)) : 1u);
    wide<<<grid, threads, 0, stream>>>(call);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class F>
void dispatch(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return f(Call<float, float>{});
    case ScalarType::Double: return f(Call<double, double>{});
    case ScalarType::BFloat16: return f(Call<__nv_bfloat16, float>{});
    case ScalarType::Half: return f(Call<__half, float>{});
    default: STD_TORCH_CHECK(false, "incorrect_brier: logits must be fp64, fp32, bf16 or fp16");
  }
}

template <class C>
C make_call(const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& target, const Tensor& stats,
            int64_t ignore_index) {
  STD_TORCH_CHECK(logits.size(1) < (int64_t(1) << 30), "incorrect_brier: more than 2^30 classes");
  STD_TORCH_CHECK(labels.has_value() != target.has_value(), "incorrect_brier: needs labels or a target");
  C call{};
  call.logits = static_cast<const typename C::Storage*>(logits.data_ptr());
  if (labels.has_value()) call.labels = {static_cast<const int64_t*>(labels->data_ptr()), labels->stride(0)};
  call.target = data_or_null<typename C::Sum>(target);
  call.stats = static_cast<typename C::Sum*>(stats.data_ptr());
  call.rows = logits.size(0);
  call.classes = static_cast<int>(logits.size(1));
  call.ignore_index = ignore_index;
  return call;
}

std::tuple<Tensor, Tensor> incorrect_brier(Tensor logits, OptionalTensor labels, OptionalTensor target,
                                           int64_t ignore_index) {
  const ScalarType type = accumulate_type(logits.scalar_type());
  Tensor loss = empty(logits, {logits.size(0)}, type), stats = empty(logits, {logits.size(0), kStats}, type);
  dispatch(logits, [&](auto empty_call) {
    using C = decltype(empty_call);
    using T = typename C::Storage;
    using A = typename C::Sum;
    C call = make_call<C>(logits, labels, target, stats, ignore_index);
    call.loss = static_cast<A*>(loss.data_ptr());
    launch(call, forward<T, A, LaneGroup>, forward<T, A, BlockGroup>, false, logits.get_device_index());
  });
  return {loss, stats};
}

Tensor incorrect_brier_backward(Tensor grad, Tensor logits, OptionalTensor labels, OptionalTensor target, Tensor stats,
                                int64_t ignore_index) {
  Tensor gradient = empty(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  dispatch(logits, [&](auto empty_call) {
    using C = decltype(empty_call);
    using T = typename C::Storage;
    using A = typename C::Sum;
    C call = make_call<C>(logits, labels, target, stats, ignore_index);
    call.grad = {static_cast<const A*>(grad.data_ptr()), grad.stride(0)};
    call.gradient = static_cast<T*>(gradient.data_ptr());
    launch(call, backward<T, A, LaneGroup>, backward<T, A, BlockGroup>, true, logits.get_device_index());
  });
  return gradient;
}

}  // namespace
}  // namespace kdfast::cuda::brier

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("incorrect_brier", TORCH_BOX(&kdfast::cuda::brier::incorrect_brier));
  m.impl("incorrect_brier_backward", TORCH_BOX(&kdfast::cuda::brier::incorrect_brier_backward));
}
