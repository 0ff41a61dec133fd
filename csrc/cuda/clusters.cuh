// Rows shared by a cluster of blocks, on GPUs of compute capability 9.0 and later.
#pragma once

#include <cooperative_groups.h>

#include "rows.cuh"

namespace kdfast::cuda {

// A row for a cluster of at most 32 blocks. What the blocks know meets in their shared memories, in the order of
// their ranks, so that every thread of all of them has the same result.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct ClusterGroup {
  int lane, lanes;

  __device__ explicit ClusterGroup(int) {
    const auto cluster = cooperative_groups::this_cluster();
    lane = cluster.block_rank() * blockDim.x + threadIdx.x;
    lanes = cluster.num_blocks() * blockDim.x;
  }
  __device__ int64_t row() const { return blockIdx.x / cooperative_groups::this_cluster().num_blocks(); }
  template <class State, class Combine>
  __device__ void reduce(State& state, const Combine& combine) const {
    alignas(16) __shared__ unsigned char memory[sizeof(State)];
    State* of_block = reinterpret_cast<State*>(memory);
    BlockGroup(0).reduce(state, combine);
    if (threadIdx.x == 0) *of_block = state;
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    const unsigned rank = threadIdx.x % kWarp;
    state = rank < cluster.num_blocks() ? *cluster.map_shared_rank(of_block, rank) : State{};
    cluster.sync();  // no block leaves, or writes anew, what another still reads
    combine(state, kWarp);
  }
};
#else
struct ClusterGroup;  // never launched here
#endif

}  // namespace kdfast::cuda
