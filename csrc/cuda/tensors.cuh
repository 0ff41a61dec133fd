// How CUDA kernels sweep a list of tensors in one launch: a table of pointers, passed by value as a kernel argument, and
// a block for each piece of at most kPiece elements. Nothing is copied to the device for it, so a launch can be captured
// in a graph.
#pragma once

#include <vector>

#include "../stable.h"
#include "rows.cuh"

namespace kdfast::cuda {

constexpr int kPiece = 32768;  // elements a block; a multiple of every chunk of 16 bytes
constexpr int kSweepThreads = 512;
// Tensors a launch: 32,764 bytes of arguments from CUDA 12.1 on (sm_70 and later), 4,096 before.
#if CUDART_VERSION >= 12010
constexpr int kTensors = 480;
#else
constexpr int kTensors = 64;
#endif

template <int Pointers>
struct Table {
  void* pointers[Pointers][kTensors];
  int64_t numel[kTensors];
  int first_piece[kTensors + 1];  // of each tensor, in this launch
  int count;                      // tensors
};

struct Place {
  int tensor;
  int64_t begin;
  int count;  // elements
};

// The tensor and the part of it that block `piece` has: a binary search over first_piece.
template <int Pointers>
__device__ Place place_of(const Table<Pointers>& table, int piece) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_piece[middle] <= piece ? low : high) = middle;
  }
  const int64_t begin = static_cast<int64_t>(piece - table.first_piece[low]) * kPiece, left = table.numel[low] - begin;
  return {low, begin, static_cast<int>(left < kPiece ? left : kPiece)};
}

// f(x, y) for each of n elements: x from `in`, in the arithmetic type, y to `out`. By 16 bytes where all tensors allow it.
template <class T, class A, int In, int Out, class F>
__device__ __forceinline__ void sweep(const T* const (&in)[In], T* const (&out)[Out], int n, const F& f) {
  uintptr_t bits = 0;
#pragma unroll
  for (int k = 0; k < In; ++k) bits |= reinterpret_cast<uintptr_t>(in[k]);
#pragma unroll
  for (int k = 0; k < Out; ++k) bits |= reinterpret_cast<uintptr_t>(out[k]);
  const int vectors = bits % 16 == 0 ? n / kChunk<T> : 0;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    Vector<T> x[In], y[Out];
#pragma unroll
    for (int k = 0; k < In; ++k) x[k] = reinterpret_cast<const Vector<T>*>(in[k])[i];
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      A a[In], b[Out];
#pragma unroll
      for (int k = 0; k < In; ++k) a[k] = static_cast<A>(x[k].x[j]);
      f(a, b);
#pragma unroll
      for (int k = 0; k < Out; ++k) y[k].x[j] = static_cast<T>(b[k]);
    }
#pragma unroll
    for (int k = 0; k < Out; ++k) {
      if (out[k] == nullptr) continue;
      uint4 whole;  // and __stwb: see store in rows.cuh
      memcpy(&whole, &y[k], sizeof(whole));
      __stwb(reinterpret_cast<uint4*>(out[k]) + i, whole);
    }
  }
  for (int i = vectors * kChunk<T> + threadIdx.x; i < n; i += blockDim.x) {
    A a[In], b[Out];
#pragma unroll
    for (int k = 0; k < In; ++k) a[k] = static_cast<A>(in[k][i]);
    f(a, b);
#pragma unroll
    for (int k = 0; k < Out; ++k) {
      if (out[k] != nullptr) out[k][i] = static_cast<T>(b[k]);
    }
  }
}

// ---------------------------------------------------------------- host
inline int64_t pieces_of(int64_t numel) { return (numel + kPiece - 1) / kPiece; }

// Calls launch(table, which tensors are in it) for each table full of tensors that have elements. `lists[k]` gives
// pointers[k]; an empty list gives null.
template <int Pointers, class F>
void for_each_table(const std::vector<Tensor>* const (&lists)[Pointers], const F& launch) {
  const std::vector<Tensor>& like = *lists[0];
  Table<Pointers> table{};
  std::vector<size_t> members;
  const auto flush = [&] {
    table.count = static_cast<int>(members.size());
    if (table.count > 0) launch(table, members);
    members.clear();
  };
  for (size_t i = 0; i < like.size(); ++i) {
    const int64_t n = like[i].numel();
    if (n == 0) continue;
    const size_t at = members.size();
    for (int k = 0; k < Pointers; ++k) table.pointers[k][at] = lists[k]->empty() ? nullptr : (*lists[k])[i].data_ptr();
    table.numel[at] = n;
    const int64_t next = table.first_piece[at] + pieces_of(n);
    STD_TORCH_CHECK(next < (int64_t(1) << 31), "too many elements for one launch");
    table.first_piece[at + 1] = static_cast<int>(next);
    members.push_back(i);
    if (members.size() == kTensors) flush();
  }
  flush();
}

inline void check_lists(const std::vector<Tensor>& theta, const std::vector<Tensor>& others) {
  STD_TORCH_CHECK(theta.size() == others.size(), "lists of tensors must have one length");
  for (size_t i = 0; i < theta.size(); ++i) {
    STD_TORCH_CHECK(theta[i].numel() == others[i].numel() && theta[i].scalar_type() == theta[0].scalar_type() &&
                        others[i].scalar_type() == theta[0].scalar_type() &&
                        others[i].get_device() == theta[0].get_device(),
                    "lists of tensors must have one type and device, and tensor by tensor one shape");
  }
}

inline std::vector<Tensor> empty_like(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& x : tensors) out.push_back(kdfast::empty_like(x));
  return out;
}

}  // namespace kdfast::cuda
