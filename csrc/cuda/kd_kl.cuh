// kd_kl on the GPU: row statistics forward, elementwise backward. Formulas: ../math/kd_kl.h.
//
//   loss = w [ (1 - alpha) c D + alpha CE ],   u = s / tau_s, q = softmax(u),   v = t / tau_t, p = softmax(v)
//
// Fused: three softmaxes, the divergence, the hard labels' cross-entropy and their gradients, with nothing of
// size [rows, classes] kept but the inputs. Forward sweeps a row once (twice for jsd, and where a temperature
// wants its gradient, and then mostly from cache) and keeps kStats numbers a row; backward is elementwise in
// them (with label smoothing or target probabilities, or hard labels beside jsd, it first sums over the row).
// Memory for a row of C classes of b bytes: forward reads 2 C b, backward reads 2 C b and writes C b, so 5
// passes over [rows, classes] at any C; 6 with the teacher's gradient, 3 for alpha = 1.
// Up to kNarrow classes a row is shared by 1 to 32 lanes; above, a block takes it, chunk by chunk, or where
// rows are few and long several blocks: then a launch sums up, one looks again if need be, and one concludes.
// Source: Hinton, Vinyals, Dean 2015 (arXiv:1503.02531); for the online sums Milakov, Gimelshein 2018
// (arXiv:1805.02867).
#pragma once

#include "kd_kl_row.cuh"

namespace kdfast::cuda {

constexpr int kNarrow = 1024;  // classes up to which lanes of a warp share a row

// Threads a block at most (multiples of 32), blocks a multiprocessor at least. In fp32 arithmetic a KL's kernels
// get 64 registers and so 1024 threads a multiprocessor, what does more 80 and 768; of two blocks one reads while
// the other begins its row or waits for its sums. fp64 wants up to 150 registers.
constexpr int kNarrowThreads = 128;
template <class F, bool kFused>
constexpr int kNarrowBlocks = sizeof(typename F::A) == 8 ? 1 : kFused || F::kMapped ? 5 : 8;
template <class F, bool kFused>
constexpr int kWideThreads = sizeof(typename F::A) == 8 ? 256 : F::kMapped && !kFused ? 384 : 512;
template <class F>
constexpr int kWideBlocks = sizeof(typename F::A) == 8 ? 1 : 2;

#define KDFAST_BOUNDS(F, Group, kFused)                                                          \
  __launch_bounds__(std::is_same_v<Group, LaneGroup> ? kNarrowThreads : kWideThreads<F, kFused>, \
                    std::is_same_v<Group, LaneGroup> ? kNarrowBlocks<F, kFused> : kWideBlocks<F>)

// Where several blocks share a row, the part a launch has in it; kWhole where none does.
enum Stage : int { kWhole, kSumUp, kLookAgain, kConclude };

// A part's numbers in the workspace: of the first sweep, then of the second.
template <class F>
struct Part {
  using A = typename F::A;
  static constexpr int kSecond = sizeof(Sums<A>) / sizeof(A);
  static_assert(kSecond + sizeof(JsdSums<A>) / sizeof(A) == kPart);
  A* numbers;

  __device__ Part(const Call<typename F::T, A>& call, int64_t row, int part)
      : numbers(call.parts + (row * call.lanes + part) * kPart) {}
  __device__ Sums<A>& first() const { return *reinterpret_cast<Sums<A>*>(numbers); }
  __device__ SecondOf<F>& second() const { return *reinterpret_cast<SecondOf<F>*>(numbers + kSecond); }
};

// Loss and statistics of a row, and what its gradients need; the same in every thread of the group. False
// where that is another launch's. With kKept the row is kept in `slots`.
template <class F, bool kKept, class Group, class T, class A>
__device__ __forceinline__ bool evaluate(const Call<T, A>& call, const Group& group, const Row<T, A>& row,
                                         int64_t index, const Chunks<F::N>& chunks, const Share& share,
                                         const Slots<T>& slots, GradientOf<F>& gradient, HardSums<A>& hard) {
  const int stage = std::is_same_v<Group, BlockGroup> && !kKept ? call.stage : kWhole;
  const int parts = call.lanes;  // at most the threads of a block
  const Options<A>& o = call.options;
  DivergenceSums<A> soft;
  if (stage <= kSumUp) {
    sum_up<F, kKept>(call, row, chunks, share, slots, soft, hard);
  } else if (group.lane < parts) {
    const Sums<A>& of_part = Part<F>(call, index, group.lane).first();
    soft = of_part.soft, hard = of_part.hard;
  }
  if (o.soft) reduce(group, soft, row.unit);
  if (o.hard) reduce(group, hard);
  if (stage == kSumUp) {
    if (group.lane == 0) {
      Sums<A>& of_part = Part<F>(call, index, blockIdx.y).first();
      of_part.soft = soft, of_part.hard = hard;
    }
    return false;
  }

  gradient = gradient_of<F>(call, row, soft);
  SecondOf<F> second;
  if (o.soft && (F::kFamily == kJsd || call.temperature_grad)) {
    if (stage != kConclude) look_again<F, kKept>(call, row, chunks, share, slots, gradient, second);
    else if (group.lane < parts) second = Part<F>(call, index, group.lane).second();
    group.reduce(second, [](SecondOf<F>& s, int lanes) { sum_members<A>(s, lanes); });
    if constexpr (F::kFamily == kJsd) gradient.of_p = second.of_p, gradient.of_q = second.of_q;
  }
  if (stage == kLookAgain) {
    if (group.lane == 0) Part<F>(call, index, blockIdx.y).second() = second;
    return false;
  }
  if (group.lane == 0 && index < call.rows) conclude<F>(call, row, index, soft, hard, gradient, second);
  return true;
}

template <class F, class Group>
__global__ void KDFAST_BOUNDS(F, Group, false) forward(const Call<typename F::T, typename F::A> call) {
  using T = typename F::T;
  using A = typename F::A;
  const Group group(call.lanes);
  const int64_t index = group.row();
  const Row<T, A> row(call, index);
  const Chunks<F::N> chunks(index, call.classes, call.aligned);
  // No early return where a row does not count: the reductions want every lane.
  const Share share{group.lane + group.lanes * static_cast<int>(blockIdx.y), row.counts ? chunks.count : 0,
                    group.lanes * static_cast<int>(gridDim.y)};
  GradientOf<F> gradient;
  HardSums<A> hard;
  evaluate<F, false>(call, group, row, index, chunks, share, Slots<T>{}, gradient, hard);
}

// ---------------------------------------------------------------- backward
template <class A>
struct Mass {
  A target = 0, finite = 0, z = 0;
};

template <class F, class Group>
__global__ void KDFAST_BOUNDS(F, Group, false) backward(const Call<typename F::T, typename F::A> call) {
  using T = typename F::T;
  using A = typename F::A;
  constexpr int N = F::N;
  const Group group(call.lanes);
  const int64_t index = group.row();
  const Row<T, A> row(call, index);
  const Options<A>& o = call.options;
  const Chunks<N> chunks(index, call.classes, call.aligned);
  const T masked = static_cast<T>(-kInfinity<A>);
  constexpr bool kNeedsZ = F::kFamily == kJsd;  // whose statistics have no room for it
  const bool exists = index < call.rows;
  const A* stats = call.stats + (exists ? index : 0) * kStats;

  A mass = A(1), spread = 0;  // of a label: 1 with or without smoothing
  A log2_z = A(kLog2e) * stats[kLogZ1];
  if (o.hard && (call.target != nullptr || o.smoothing > A(0) || kNeedsZ)) {  // the same answer in every lane
    Mass<A> sums;
    const int count = row.counts ? chunks.count : 0;
    for (int chunk = group.lane; chunk < count; chunk += group.lanes) {
      const int first = chunks.first(chunk);
      A s[N], target[N] = {};
      if (o.smoothing > A(0) || kNeedsZ) {
        logits<F>(load(o.reverse ? row.from : row.to, chunks, first, masked), o, s);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sums.finite += s[i] == -kInfinity<A> ? A(0) : A(1);
          if (kNeedsZ) sums.z += exp2_of((s[i] - stats[kMaxS]) * A(kLog2e));
        }
      }
      if (row.target != nullptr) load_beside(row.target, chunks, first, A(0), target);
#pragma unroll
      for (int i = 0; i < N; ++i) sums.target += target[i];
    }
    group.reduce(sums, [](Mass<A>& m, int lanes) { sum_members<A>(m, lanes); });
    if (o.smoothing > A(0)) spread = o.smoothing / sums.finite;
    if (row.target != nullptr) mass = o.keep_hard * sums.target + o.smoothing;
    if (kNeedsZ) log2_z = log2_of(sums.z);
  }
  if (!exists) return;

  const A max_from = stats[o.reverse ? kMaxS : kMaxT], max_to = stats[o.reverse ? kMaxT : kMaxS];
  const A log2_z_from = A(kLog2e) * stats[o.reverse ? kLogZU : kLogZV];
  const A log2_z_to = A(kLog2e) * stats[o.reverse ? kLogZV : kLogZU];
  A max_student = stats[kMaxS];
  GradientOf<F> soft;
  if constexpr (F::kFamily == kJsd) {
    soft = {row.unit, max_from, max_to, log2_z_from, log2_z_to, o.beta, stats[kD], stats[kLogZ1]};
  } else if constexpr (F::kFamily == kDkd) {
    const A label_to = label_logit<F>(call, row, row.to);
    soft = dkd_gradient(o, row.unit, max_from, max_to, log2_z_from, log2_z_to, stats[kD],
                        label_logit<F>(call, row, row.from), label_to);
    max_student = larger(max_student, label_to);
  } else {
    soft = {row.unit, max_from, max_to, log2_z_from, log2_z_to, stats[kD]};
  }
  const HardGradient<A> hard{max_student, log2_z, mass, spread, o.keep_hard};
  // A wide row may be cut over gridDim.y blocks.
  const Share share{group.lane + group.lanes * static_cast<int>(blockIdx.y), chunks.count,
                    group.lanes * static_cast<int>(gridDim.y)};
  write<F, false>(call, row, index, chunks, share, Slots<T>{}, soft, hard);
}

}  // namespace kdfast::cuda
