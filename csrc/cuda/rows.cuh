// How CUDA kernels walk the rows of a [rows, classes] tensor: groups of threads that share a row, 16-byte
// chunks of it, and reductions over the group.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../math/online_softmax.h"

namespace kdfast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kEveryLane = 0xffffffffu;

// A column [rows] or [1]: stride 0 where one value serves every row.
template <class T>
struct Column {
  const T* data;
  int64_t stride;
  __device__ T at(int64_t row) const { return data[row * stride]; }
};

// ---------------------------------------------------------------- chunks
// A chunk is 16 bytes of the logits. Chunks are cut at the 16-byte boundaries of memory, not of the row, so
// all but the first and the last of a row are single loads whatever the row's length. Where a base pointer is
// itself not aligned (a view into another tensor) every chunk is taken element by element.
template <class T>
constexpr int kChunk = 16 / sizeof(T);

template <int N>
struct Chunks {
  int classes, count, offset;  // offset: elements of the first chunk that belong to the row before
  bool aligned;

  __device__ Chunks(int64_t row, int classes, bool aligned)
      : classes(classes), offset(aligned ? static_cast<int>((row * classes) % N) : 0), aligned(aligned) {
    count = (classes + offset + N - 1) / N;
  }
  __device__ int first(int chunk) const { return chunk * N - offset; }
  __device__ bool whole(int first) const { return aligned && first >= 0 && first + N <= classes; }
  __device__ bool inside(int column) const { return column >= 0 && column < classes; }
};

// A chunk as it lies in memory: kept in the storage type, 4 registers, until an element is wanted.
template <class T>
struct alignas(16) Vector {
  T x[kChunk<T>];
};

// The chunk from column `first` of a row; `fill` outside the row.
template <class T>
__device__ __forceinline__ Vector<T> load(const T* __restrict__ row, const Chunks<kChunk<T>>& chunks,
                                          int first, T fill) {
  if (chunks.whole(first)) return *reinterpret_cast<const Vector<T>*>(row + first);
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) v.x[i] = chunks.inside(first + i) ? row[first + i] : fill;
  return v;
}

template <class T>
__device__ __forceinline__ void store(T* __restrict__ row, const Chunks<kChunk<T>>& chunks, int first,
                                      const Vector<T>& v) {
  if (chunks.whole(first)) {
    uint4 bits;  // and __stwb, as nvcc 13.0 tears a plain store of 16 bytes to pieces here
    memcpy(&bits, &v, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(row + first), bits);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if (chunks.inside(first + i)) row[first + i] = v.x[i];
    }
  }
}

template <class A, class T>
__device__ __forceinline__ void widen(const Vector<T>& v, A (&out)[kChunk<T>]) {
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) out[i] = static_cast<A>(v.x[i]);
}

// N elements of a row in the arithmetic type, beside a chunk of N logits in their storage type.
template <class A, int N>
__device__ __forceinline__ void load_beside(const A* __restrict__ row, const Chunks<N>& chunks, int first,
                                            A fill, A (&out)[N]) {
  if (chunks.whole(first)) {
#pragma unroll
    for (int begin = 0; begin < N; begin += kChunk<A>) {
      const Vector<A> v = *reinterpret_cast<const Vector<A>*>(row + first + begin);
#pragma unroll
      for (int i = 0; i < kChunk<A>; ++i) out[begin + i] = v.x[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = chunks.inside(first + i) ? row[first + i] : fill;
  }
}

// The chunks of a row that are one thread's.
struct Share {
  int begin, end, step;
};

// Chunks of two tensors kept on chip between two sweeps: every thread puts its own 16 bytes in a column of
// shared memory and finds them there again, so no thread waits for another, and no bank is hit twice.
template <class T>
struct Slots {
  uint4* column;
  int threads;

  __device__ static uint4 bits(const Vector<T>& v) {
    uint4 b;
    memcpy(&b, &v, sizeof(b));
    return b;
  }
  __device__ static Vector<T> vector(const uint4& b) {
    Vector<T> v;
    memcpy(&v, &b, sizeof(v));
    return v;
  }
  __device__ void put(int turn, const Vector<T>& a, const Vector<T>& b) const {
    column[2 * turn * threads] = bits(a);
    column[(2 * turn + 1) * threads] = bits(b);
  }
  __device__ Vector<T> first(int turn) const { return vector(column[2 * turn * threads]); }
  __device__ Vector<T> second(int turn) const { return vector(column[(2 * turn + 1) * threads]); }
};

// ---------------------------------------------------------------- groups
// Reductions over 2^n neighbouring lanes; every lane of the warp must call them, whether it has a row or not,
// and every lane gets the result, bit for bit the same.
template <class A>
__device__ __forceinline__ A sum_over(A x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kEveryLane, x, step);
  return x;
}
template <class A>
__device__ __forceinline__ A max_over(A x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(kEveryLane, x, step));
  return x;
}

// Adds up every member of a struct of numbers of type A.
template <class A, class State>
__device__ __forceinline__ void sum_members(State& state, int lanes) {
  static_assert(sizeof(State) % sizeof(A) == 0);
  A members[sizeof(State) / sizeof(A)];
  memcpy(members, &state, sizeof(State));
#pragma unroll
  for (A& x : members) x = sum_over(x, lanes);
  memcpy(&state, members, sizeof(State));
}

// The threads that share a row: 1 to 32 lanes of a warp (a power of two) with several rows a block, ...
struct LaneGroup {
  int lane, lanes;

  __device__ explicit LaneGroup(int lanes) : lane(threadIdx.x & (lanes - 1)), lanes(lanes) {}
  __device__ int64_t row() const {
    const int shift = __ffs(lanes) - 1;
    return static_cast<int64_t>(blockIdx.x) * (blockDim.x >> shift) + (threadIdx.x >> shift);
  }
  // combine(state, lanes) reduces over neighbouring lanes.
  template <class State, class Combine>
  __device__ void reduce(State& state, const Combine& combine) const {
    combine(state, lanes);
  }
};

// ... or the whole block, a multiple of 32 threads (or a cluster of blocks: clusters.cuh).
struct BlockGroup {
  int lane, lanes;

  __device__ explicit BlockGroup(int) : lane(threadIdx.x), lanes(blockDim.x) {}
  __device__ int64_t row() const { return blockIdx.x; }
  template <class State, class Combine>
  __device__ void reduce(State& state, const Combine& combine) const {
    alignas(16) __shared__ unsigned char memory[kWarp * sizeof(State)];
    State* of_warp = reinterpret_cast<State*>(memory);
    combine(state, kWarp);
    const int thread = threadIdx.x;
    if (thread % kWarp == 0) of_warp[thread / kWarp] = state;
    __syncthreads();
    state = thread % kWarp < static_cast<int>(blockDim.x) / kWarp ? of_warp[thread % kWarp] : State{};
    __syncthreads();  // the memory may be written again by the next reduction of this type
    combine(state, kWarp);  // in every warp, so that every thread has the result without a third barrier
  }
};

}  // namespace kdfast::cuda
