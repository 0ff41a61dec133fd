// The only home of libtorch's stable ABI: aliases, invariant checks, shims.
// Users' errors are raised in Python before a kernel runs; what is checked here are our own invariants.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>

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

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
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
