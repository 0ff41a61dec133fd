// What launchers of row kernels share: columns, alignment, storage types.
#pragma once

#include <algorithm>
#include <limits>

#include "../stable.h"
#include "rows.cuh"

namespace kdfast::cuda {

template <class T>
Column<T> column_of(const OptionalTensor& x) {
  if (!x.has_value()) return {nullptr, 0};
  return {static_cast<const T*>(x->data_ptr()), x->numel() == 1 ? 0 : x->stride(0)};
}

// A result that may not be wanted: empty then.
template <class T>
T* result_or_null(const Tensor& x) {
  return x.numel() == 0 ? nullptr : static_cast<T*>(x.data_ptr());
}

inline bool on_chunk(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }  // null is

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) cudaGetLastError();  // said here, and not once more after the next launch
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

inline unsigned grid_of(int64_t n) {
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "kdfast: too many rows for one launch");
  return static_cast<unsigned>(n);
}

inline int power_of_two_at_least(int x) {
  int p = 1;
  while (p < x) p *= 2;
  return p;
}

template <class T>
int most_chunks(int classes) {
  return classes / kChunk<T> + (classes % kChunk<T> == 0 ? 0 : 2);
}

// f(T{}, A{}): the storage type of the logits, and that of the arithmetic.
template <class F>
void with_types(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{}, float{});
    case ScalarType::Half: return f(__half{}, float{});
    default: STD_TORCH_CHECK(false, "kdfast: logits must be fp64, fp32, bf16 or fp16");
  }
}

}  // namespace kdfast::cuda
