// The only home of libtorch's stable ABI: aliases, invariant checks, shims.
// Users' errors are raised in Python before a kernel runs; what is checked here are our own invariants.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // its name from torch 2.12 on
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#if defined(USE_CUDA)  // also what makes the header above declare the call for the current stream
#include <cuda_runtime_api.h>
#endif

namespace kdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* data_or_null(const OptionalTensor& x) {
  return x.has_value() ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

// fp64 is summed in fp64, every narrower storage type in fp32.
inline ScalarType accumulate_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A new contiguous tensor on the device of another. By the C call: new_empty goes through the dispatcher boxed, which
// at 128 x 10 was 4 of the 18 us of a kernel call.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4] = {1, 1, 1, 1};
  const int64_t* size = sizes.begin();
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 2; i >= 0; --i) strides[i] = strides[i + 1] * size[i + 1];
  const bool cpu = like.is_cpu();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), size, strides, static_cast<int32_t>(type),
      cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(), cpu ? 0 : like.get_device(), &handle));
  return Tensor(handle);
}

// The same for the shape, strides and type of another tensor, whose elements must fill their memory.
inline Tensor empty_like(const Tensor& like) {
  const bool cpu = like.is_cpu();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      like.dim(), like.sizes().data(), like.strides().data(), static_cast<int32_t>(like.scalar_type()),
      cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(), cpu ? 0 : like.get_device(), &handle));
  return Tensor(handle);
}

#if defined(USE_CUDA)
// Kernels are to run on this stream, under `const torch::stable::accelerator::DeviceGuard guard(device)`.
// torch::stable's own Stream hands out the native handle only from torch 2.13.
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace kdfast
