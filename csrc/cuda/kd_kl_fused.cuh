// kd_kl's loss, statistics and the student's gradient in one launch, the row kept on chip in between.
//
// Memory for a row of C classes of b bytes: reads 2 C b, writes C b: 3 passes over [rows, classes] where
// forward and backward make 5. For that the row has to fit into shared memory, 2 C b bytes: of a block (28,000
// classes in fp32 on sm_90, twice as many in 16 bits; half of it where two blocks are to share a multiprocessor),
// or on sm_90 and later of a cluster of up to 16 blocks (450,000), which exchange their sums through each other's
// shared memory. Formulas: ../math/kd_kl.h.
#pragma once

#include "clusters.cuh"
#include "kd_kl.cuh"

namespace kdfast::cuda {

template <class F, class Group>
__device__ __forceinline__ void value_and_grad_of(const Call<typename F::T, typename F::A>& call) {
  using T = typename F::T;
  using A = typename F::A;
  extern __shared__ uint4 memory_of_slots[];
  const Group group(call.lanes);
  const int64_t index = group.row();
  const Row<T, A> row(call, index);
  const Options<A>& o = call.options;
  const Chunks<F::N> chunks(index, call.classes, call.aligned);
  const Slots<T> slots{memory_of_slots + threadIdx.x, static_cast<int>(blockDim.x)};
  GradientOf<F> soft;
  HardSums<A> sums;
  const Share share{group.lane, row.counts ? chunks.count : 0, group.lanes};
  evaluate<F, true>(call, group, row, index, chunks, share, slots, soft, sums);
  if (index >= call.rows) return;
  const A mass = row.target != nullptr ? o.keep_hard * sums.mass + o.smoothing : A(1);
  const A spread = o.smoothing > A(0) ? o.smoothing / sums.finite : A(0);
  const HardGradient<A> hard{sums.softmax.max, log2_of(sums.softmax.sum), mass, spread, o.keep_hard};
  write<F, true>(call, row, index, chunks, {group.lane, chunks.count, group.lanes}, slots, soft, hard);
}

template <class F, class Group>
__global__ void KDFAST_BOUNDS(F, Group, true) value_and_grad(const Call<typename F::T, typename F::A> call) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (!std::is_same_v<Group, ClusterGroup>)  // which the launcher does not ask for there
#endif
    value_and_grad_of<F, Group>(call);
}

}  // namespace kdfast::cuda
