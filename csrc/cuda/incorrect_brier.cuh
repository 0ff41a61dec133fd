// incorrect_brier on the GPU: row statistics forward, elementwise backward.
//
//   p = softmax(z),  a = p - y,   loss = sum a^2  where argmax z != argmax y, else 0
//   dz = 2 p (a - <p, a>)         where wrong, else 0
//
// Fused: softmax, prediction, squared error and gradient. Forward reads a row once from memory, for its maximum, the
// place of that and the sum of exponentials; a wrong row a second time, from cache, for sum a^2 and <p, a>: the
// difference must be taken before the square. Backward is elementwise in the four statistics, and reads wrong rows only.
// Memory for a row of C classes of b bytes: forward reads C b, backward reads C b where wrong and writes C b (and the
// target, where it is given, as often as z).
// Up to kNarrow classes a row is shared by 1 to 32 lanes; above, a block takes it, chunk by chunk.
// Source: Liu et al. 2022 (arXiv:2202.07940), eq. 8; docs/math/incorrect_brier.md.
#pragma once

#include <type_traits>

#include "rows.cuh"

namespace kdfast::cuda::brier {

constexpr int kNarrow = 1024;        // classes up to which lanes of a warp share a row
constexpr int kNarrowThreads = 128;  // a block
constexpr int kWideThreads = 512;    // a block, at most (a power of two)

// Blocks a multiprocessor at least: left to itself ptxas spills in fp64 for the sake of more.
#define KDFAST_BRIER_BOUNDS(A, Group)                                                      \
  __launch_bounds__(std::is_same_v<Group, BlockGroup> ? kWideThreads : kNarrowThreads, \
                    !std::is_same_v<Group, BlockGroup> && sizeof(A) == 4 ? 8 : 1)

// The layout stands in kdfast/reference/incorrect_brier.py.
enum Statistic { kMax, kSum, kInner, kWrong, kStats };

template <class T, class A>
struct Call {
  using Storage = T;
  using Sum = A;
  const T* logits;         // [rows, classes]
  Column<int64_t> labels;  // [rows], or null
  const A* target;         // [rows, classes], or null
  Column<A> grad;          // [rows]; null in forward
  A *loss, *stats;         // [rows], [rows, kStats]
  T* gradient;             // [rows, classes]; null in forward
  int64_t rows, ignore_index;
  int classes, lanes;
  bool aligned;
};

// The largest seen, and the first place it was seen at. A NaN is passed over here, and found again in the sums.
template <class A>
struct Largest {
  A value = -kInfinity<A>;
  int column = 0x7fffffff;

  __device__ void see(A x, int at) {
    if (x > value || (x == value && at < column)) value = x, column = at;
  }
  __device__ void reduce(int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      const A x = __shfl_xor_sync(kEveryLane, value, step);
      see(x, __shfl_xor_sync(kEveryLane, column, step));
    }
  }
};

template <class A>
struct First {  // what the first sweep finds
  Largest<A> logit, target;
  A sum = 0;   // of exp(z - logit.value)
  A mass = 0;  // of the target: NaN where it holds one
};

template <class A>
struct Second {
  A loss = 0, inner = 0;
};

// What a row's label says: whether the row counts, and for a label out of range NaN.
template <class T, class A>
struct Labelled {
  bool counts;
  int label = -1;
  bool outside = false;

  __device__ Labelled(const Call<T, A>& call, int64_t index) : counts(index < call.rows) {
    if (!counts || call.labels.data == nullptr) return;
    const int64_t given = call.labels.at(index);
    counts = given != call.ignore_index;
    outside = counts && (given < 0 || given >= call.classes);
    if (!outside) label = static_cast<int>(given);
  }
};

template <class T, class A, class Group>
__global__ void KDFAST_BRIER_BOUNDS(A, Group) forward(const Call<T, A> call) {
  constexpr int N = kChunk<T>;
  const Group group(call.lanes);
  const int64_t index = group.row();
  const Labelled<T, A> row(call, index);
  const Chunks<N> chunks(index, call.classes, call.aligned);
  const int64_t begin = index * call.classes;
  const int count = row.counts && !row.outside ? chunks.count : 0;  // no early return: the reductions want every lane
  const T masked = static_cast<T>(-kInfinity<A>);                   // stands outside the row: such a class adds nothing

  First<A> first;
  for (int chunk = group.lane; chunk < count; chunk += group.lanes) {
    const int at = chunks.first(chunk);
    A z[N];
    widen(load(call.logits + begin, chunks, at, masked), z);
    const A before = first.logit.value;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (chunks.inside(at + i)) first.logit.see(z[i], at + i);
    }
    const A base = base_of(first.logit.value);
    if (first.logit.value > before) first.sum *= exp2_of(A(kLog2e) * (before - base));
#pragma unroll
    for (int i = 0; i < N; ++i) first.sum += exp2_of(A(kLog2e) * (z[i] - base));
    if (call.target != nullptr) {
      A y[N];
      load_beside(call.target + begin, chunks, at, A(0), y);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (chunks.inside(at + i)) first.target.see(y[i], at + i);
        first.mass += y[i];
      }
    }
  }
  group.reduce(first, [](First<A>& f, int lanes) {
    const A own = f.logit.value;
    f.logit.reduce(lanes);
    // A lane that saw no row, or masked classes only, has a sum of 0 (or NaN); base_of keeps inf - inf out of it.
    f.sum *= exp2_of(A(kLog2e) * (own - base_of(f.logit.value)));
    f.sum = sum_over(f.sum, lanes);
    f.target.reduce(lanes);
    f.mass = sum_over(f.mass, lanes);
  });

  const int label = call.target != nullptr ? first.target.column : row.label;
  // A NaN among the logits or a +inf makes the sum NaN; no finite logit leaves it 0.
  const bool spoilt = row.outside || !(first.sum > A(0)) || first.mass != first.mass;
  const bool is_wrong = row.counts && !spoilt && label != first.logit.column;
  const A per_sum = A(1) / first.sum;

  Second<A> second;
  for (int chunk = group.lane; chunk < (is_wrong ? chunks.count : 0); chunk += group.lanes) {
    const int at = chunks.first(chunk);
    A z[N], y[N] = {};
    widen(load(call.logits + begin, chunks, at, masked), z);
    if (call.target != nullptr) load_beside(call.target + begin, chunks, at, A(0), y);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A p = exp2_of(A(kLog2e) * (z[i] - first.logit.value)) * per_sum;
      const A a = p - (call.target == nullptr && at + i == label ? A(1) : y[i]);
      second.loss += a * a;
      second.inner += p * a;
    }
  }
  group.reduce(second, [](Second<A>& s, int lanes) {
    s.loss = sum_over(s.loss, lanes), s.inner = sum_over(s.inner, lanes);
  });

  if (group.lane != 0 || index >= call.rows) return;
  const A wrong = !row.counts ? A(0) : spoilt ? A(NAN) : is_wrong ? A(1) : A(0);
  A* stats = call.stats + index * kStats;
  call.loss[index] = is_wrong ? second.loss : wrong;
  stats[kMax] = row.counts ? first.logit.value : A(0);
  stats[kSum] = first.sum, stats[kInner] = second.inner, stats[kWrong] = wrong;
}

template <class T, class A, class Group>
__global__ void KDFAST_BRIER_BOUNDS(A, Group) backward(const Call<T, A> call) {
  constexpr int N = kChunk<T>;
  const Group group(call.lanes);
  const int64_t index = group.row();
  if (index >= call.rows) return;  // nothing is reduced here
  const Chunks<N> chunks(index, call.classes, call.aligned);
  const int64_t begin = index * call.classes;
  const T masked = static_cast<T>(-kInfinity<A>);
  const A* stats = call.stats + index * kStats;
  const A max = stats[kMax], inner = stats[kInner], wrong = stats[kWrong];
  const A per_sum = A(1) / stats[kSum], factor = A(2) * call.grad.at(index);
  const int64_t label = call.labels.data != nullptr ? call.labels.at(index) : -1;
  const int step = group.lanes * gridDim.y;  // a wide row may be cut over gridDim.y blocks
  for (int chunk = group.lane + group.lanes * blockIdx.y; chunk < chunks.count; chunk += step) {
    const int at = chunks.first(chunk);
    Vector<T> dz;
#pragma unroll
    for (int i = 0; i < N; ++i) dz.x[i] = static_cast<T>(wrong);  // 0 or NaN
    if (wrong == A(1)) {
      A z[N], y[N] = {};
      widen(load(call.logits + begin, chunks, at, masked), z);
      if (call.target != nullptr) load_beside(call.target + begin, chunks, at, A(0), y);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A p = exp2_of(A(kLog2e) * (z[i] - max)) * per_sum;
        const A a = p - (at + i == label ? A(1) : y[i]);
        dz.x[i] = static_cast<T>(factor * p * (a - inner));
      }
    }
    store(call.gradient + begin, chunks, at, dz);
  }
}

}  // namespace kdfast::cuda::brier
