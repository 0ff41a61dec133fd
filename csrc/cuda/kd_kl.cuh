// kd_kl on the GPU: row statistics forward, elementwise backward. Formulas: ../math/kd_kl.h.
//
//   loss = w [ (1 - alpha) c D + alpha CE ],   u = s / tau_s, q = softmax(u),   v = t / tau_t, p = softmax(v)
//
// Fused: three softmaxes, the divergence, the hard labels' cross-entropy and their gradients, with nothing of
// size [rows, classes] kept but the inputs. Forward sweeps a row once (twice where a temperature wants its
// gradient, and then mostly from cache) and keeps kStats numbers a row; backward is elementwise in them (with
// label smoothing or target probabilities it first sums those over the row).
// Memory for a row of C classes of b bytes: forward reads 2 C b, backward reads 2 C b and writes C b, so 5
// passes over [rows, classes] at any C; 6 with the teacher's gradient, 3 for alpha = 1.
// Up to kNarrow classes a row is shared by 1 to 32 lanes; above, a block takes it, chunk by chunk.
// Source: Hinton, Vinyals, Dean 2015 (arXiv:1503.02531); for the online sums Milakov, Gimelshein 2018
// (arXiv:1805.02867).
#pragma once

#include <type_traits>

#include "../math/kd_kl.h"
#include "rows.cuh"

namespace kdfast::cuda {

using namespace kdfast::kd_kl;

constexpr int kNarrow = 1024;  // classes up to which lanes of a warp share a row

// Threads a block at most (a power of two), blocks a multiprocessor at least. In fp32 arithmetic both kinds
// of kernel get 64 registers and so 1024 threads a multiprocessor; fp64 wants about 110 registers.
constexpr int kNarrowThreads = 128;
template <class A>
constexpr int kNarrowBlocks = sizeof(A) == 4 ? 8 : 1;
template <class A>
constexpr int kWideThreads = sizeof(A) == 4 ? 1024 : 512;

#define KDFAST_BOUNDS(A, Group)                                                                      \
  __launch_bounds__(std::is_same_v<Group, BlockGroup> ? kWideThreads<A> : kNarrowThreads,            \
                    std::is_same_v<Group, BlockGroup> ? 1 : kNarrowBlocks<A>)

template <class T, class A>
struct Call {
  using Storage = T;
  using Sum = A;
  const T *student, *teacher;                                 // [rows, classes]
  Column<A> student_temperature, teacher_temperature;         // [1] or [rows], or null
  Column<int64_t> labels;                                     // [rows], or null
  const A* target;                                            // [rows, classes], or null
  Column<A> weight, grad;                                     // [rows], or null
  A *loss, *stats;                                            // [rows], [rows, kStats]
  T *student_grad, *teacher_grad;                             // [rows, classes], or null
  Options<A> options;
  int64_t rows;
  int classes, lanes;
  bool aligned, temperature_grad;
};

// The scalars of one row, and its place.
template <class T, class A>
struct Row {
  const T *from = nullptr, *to = nullptr;  // the logits that weigh, and the others
  const A* target = nullptr;
  A tau_s = 1, tau_t = 1, per_tau_s = 1, per_tau_t = 1;  // the temperatures and their inverses
  A coefficient = 1;
  Units<A> unit{};
  int label = -1;       // -1: none
  bool counts = false;  // there is such a row, and its label is not ignore_index

  __device__ Row(const Call<T, A>& call, int64_t index) {
    const Options<A>& o = call.options;
    if (index >= call.rows) return;
    counts = true;
    if (call.weight.data != nullptr) coefficient = call.weight.at(index);
    const int64_t begin = index * call.classes;
    if (call.target != nullptr) target = call.target + begin;
    if (call.labels.data != nullptr) {
      const int64_t given = call.labels.at(index);
      counts = given != o.ignore_index;
      const bool exists = given >= 0 && given < call.classes;
      if (!exists) coefficient = NAN;  // the row's loss and gradients say so
      if (exists && target == nullptr) label = static_cast<int>(given);
    }
    tau_s = call.student_temperature.data != nullptr ? call.student_temperature.at(index) : o.tau_s;
    tau_t = call.teacher_temperature.data != nullptr ? call.teacher_temperature.at(index) : o.tau_t;
    per_tau_s = A(1) / tau_s, per_tau_t = A(1) / tau_t;
    from = (o.reverse ? call.student : call.teacher) + begin;
    to = (o.reverse ? call.teacher : call.student) + begin;
    const A k_s = A(kLog2e) * per_tau_s, k_t = A(kLog2e) * per_tau_t;
    unit = {o.reverse ? k_s : k_t, o.reverse ? k_t : k_s, o.entropy};
  }

  __device__ A student_at(const Call<T, A>& call, int column) const {
    return static_cast<A>((call.options.reverse ? from : to)[column]);
  }
};

// ---------------------------------------------------------------- forward
template <class T, class A, class Group>
__global__ void KDFAST_BOUNDS(A, Group) forward(const Call<T, A> call) {
  constexpr int N = kChunk<T>;
  const Group group(call.lanes);
  const int64_t index = group.row();
  const Row<T, A> row(call, index);
  const Options<A>& o = call.options;
  const Chunks<N> chunks(index, call.classes, call.aligned);
  const int count = row.counts ? chunks.count : 0;  // no early return: the reductions want every lane
  const T masked = static_cast<T>(-kInfinity<A>);   // stands outside the row: a masked class adds nothing

  DivergenceSums<A> sums;
  HardSums<A> hard;
  for (int chunk = group.lane; chunk < count; chunk += group.lanes) {
    const int first = chunks.first(chunk);
    A x[N], y[N];  // logits of from, of to
    widen(load(row.to, chunks, first, masked), y);
    if (o.soft) {
      widen(load(row.from, chunks, first, masked), x);
      sums.add(x, y, row.unit);
    }
    if (o.hard) {
      A target[N] = {};
      if (row.target != nullptr) load_beside(row.target, chunks, first, A(0), target);
      if (o.reverse) hard.add(x, target);
      else hard.add(y, target);
    }
  }
  if (o.soft) {
    group.reduce(sums, [&](DivergenceSums<A>& s, int lanes) {
      s.raise(max_over(s.from.max, lanes), max_over(s.to.max, lanes), row.unit);
      s.from.sum = sum_over(s.from.sum, lanes), s.to.sum = sum_over(s.to.sum, lanes);
      s.cross = sum_over(s.cross, lanes);
    });
  }
  if (o.hard) {
    group.reduce(hard, [](HardSums<A>& h, int lanes) {
      h.raise(max_over(h.softmax.max, lanes));
      h.softmax.sum = sum_over(h.softmax.sum, lanes);
      h.finite = sum_over(h.finite, lanes), h.finite_dot = sum_over(h.finite_dot, lanes);
      h.mass = sum_over(h.mass, lanes), h.dot = sum_over(h.dot, lanes);
    });
  }

  const ScaleFactor<A> c = scale_factor(o.scale, row.tau_s, row.tau_t);
  const A divergence = sums.divergence(o.entropy);
  const A log2_z_from = log2_of(sums.from.sum), log2_z_to = log2_of(sums.to.sum);
  A by_tau_s = 0, by_tau_t = 0;
  if (o.soft && call.temperature_grad) {
    const DivergenceGradient<A> gradient{row.unit,  sums.from.max, sums.to.max,
                                         log2_z_from, log2_z_to,   divergence};
    TemperatureSums<A> inner;
    for (int chunk = group.lane; chunk < count; chunk += group.lanes) {
      const int first = chunks.first(chunk);
      const Vector<T> x = load(row.from, chunks, first, masked), y = load(row.to, chunks, first, masked);
#pragma unroll
      for (int i = 0; i < N; ++i) inner.add(gradient, static_cast<A>(x.x[i]), static_cast<A>(y.x[i]));
    }
    group.reduce(inner, [](TemperatureSums<A>& t, int lanes) {
      t.from = sum_over(t.from, lanes), t.to = sum_over(t.to, lanes);
    });
    const A factor = row.coefficient * o.keep, unit = A(kLn2) * c.value;
    const A inner_s = o.reverse ? inner.from : inner.to, inner_t = o.reverse ? inner.to : inner.from;
    by_tau_s = factor * (c.by_tau_s * divergence - unit * row.per_tau_s * inner_s);
    by_tau_t = factor * (c.by_tau_t * divergence - unit * row.per_tau_t * inner_t);
  }

  if (group.lane != 0 || index >= call.rows) return;
  A out[kStats] = {};
  A loss = 0;
  if (row.counts) {
    if (o.soft) {
      out[kMaxS] = o.reverse ? sums.from.max : sums.to.max;
      out[kMaxT] = o.reverse ? sums.to.max : sums.from.max;
      out[kLogZU] = A(kLn2) * (o.reverse ? log2_z_from : log2_z_to);
      out[kLogZV] = A(kLn2) * (o.reverse ? log2_z_to : log2_z_from);
      out[kD] = divergence, out[kGradTauS] = by_tau_s, out[kGradTauT] = by_tau_t;
      loss = o.keep * c.value * divergence;
    }
    if (o.hard) {
      out[kMaxS] = hard.softmax.max;
      out[kLogZ1] = A(kLn2) * log2_of(hard.softmax.sum);
      if (row.label >= 0) {
        hard.mass = A(1);
        hard.dot = (row.student_at(call, row.label) - base_of(hard.softmax.max)) * A(kLog2e);
      }
      loss += o.alpha * hard.cross_entropy(o);
    }
    loss *= row.coefficient;
  }
  call.loss[index] = loss;
#pragma unroll
  for (int i = 0; i < kStats; ++i) call.stats[index * kStats + i] = out[i];
}

// ---------------------------------------------------------------- backward
template <class A>
struct Mass {
  A target = 0, finite = 0;
};

template <class T, class A, class Group>
__global__ void KDFAST_BOUNDS(A, Group) backward(const Call<T, A> call) {
  constexpr int N = kChunk<T>;
  const Group group(call.lanes);
  const int64_t index = group.row();
  const Row<T, A> row(call, index);
  const Options<A>& o = call.options;
  const Chunks<N> chunks(index, call.classes, call.aligned);
  const T masked = static_cast<T>(-kInfinity<A>);

  A mass = A(1), spread = 0;  // of a label: 1 with or without smoothing
  if (o.hard && (call.target != nullptr || o.smoothing > A(0))) {  // the same answer in every lane
    Mass<A> sums;
    const int count = row.counts ? chunks.count : 0;
    for (int chunk = group.lane; chunk < count; chunk += group.lanes) {
      const int first = chunks.first(chunk);
      A s[N], target[N] = {};
      if (o.smoothing > A(0)) {
        widen(load(o.reverse ? row.from : row.to, chunks, first, masked), s);
#pragma unroll
        for (int i = 0; i < N; ++i) sums.finite += s[i] == -kInfinity<A> ? A(0) : A(1);
      }
      if (row.target != nullptr) load_beside(row.target, chunks, first, A(0), target);
#pragma unroll
      for (int i = 0; i < N; ++i) sums.target += target[i];
    }
    group.reduce(sums, [](Mass<A>& m, int lanes) {
      m.target = sum_over(m.target, lanes), m.finite = sum_over(m.finite, lanes);
    });
    if (o.smoothing > A(0)) spread = o.smoothing / sums.finite;
    if (row.target != nullptr) mass = o.keep_hard * sums.target + o.smoothing;
  }
  if (index >= call.rows) return;

  const A* stats = call.stats + index * kStats;
  const A factor = call.grad.at(index) * row.coefficient;
  const A c = row.counts ? o.keep * factor * scale_factor(o.scale, row.tau_s, row.tau_t).value : A(0);
  const A of_student = c * row.per_tau_s, of_teacher = c * row.per_tau_t, of_hard = o.alpha * factor;
  const DivergenceGradient<A> soft{row.unit,
                                   stats[o.reverse ? kMaxS : kMaxT],
                                   stats[o.reverse ? kMaxT : kMaxS],
                                   A(kLog2e) * stats[o.reverse ? kLogZU : kLogZV],
                                   A(kLog2e) * stats[o.reverse ? kLogZV : kLogZU],
                                   stats[kD]};
  const HardGradient<A> hard{stats[kMaxS], A(kLog2e) * stats[kLogZ1], mass, spread, o.keep_hard};
  const int64_t begin = index * call.classes;
  // A wide row may be cut over gridDim.y blocks.
  const int step = group.lanes * gridDim.y;
  for (int chunk = group.lane + group.lanes * blockIdx.y; chunk < chunks.count; chunk += step) {
    const int first = chunks.first(chunk);
    Vector<T> ds{}, dt{};
    if (row.counts) {  // an ignored row has gradient 0, whatever its logits hold
      const Vector<T> to = load(row.to, chunks, first, masked);
      const Vector<T> from = o.soft ? load(row.from, chunks, first, masked) : Vector<T>{};
      A target[N] = {};
      if (row.target != nullptr) load_beside(row.target, chunks, first, A(0), target);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A x = static_cast<A>(from.x[i]), y = static_cast<A>(to.x[i]);
        A by_student = 0, by_teacher = 0;
        if (o.soft) {
          const auto e = soft.at(x, y);
          const A by_to = soft.by_to(e), by_from = soft.by_from(e);
          by_student = of_student * (o.reverse ? by_from : by_to);
          by_teacher = of_teacher * (o.reverse ? by_to : by_from);
        }
        if (o.hard) {
          const A one_hot = first + i == row.label ? A(1) : target[i];
          by_student += of_hard * hard.at(o.reverse ? x : y, one_hot);
        }
        ds.x[i] = static_cast<T>(by_student), dt.x[i] = static_cast<T>(by_teacher);
      }
    }
    if (call.student_grad != nullptr) store(call.student_grad + begin, chunks, first, ds);
    if (call.teacher_grad != nullptr) store(call.teacher_grad + begin, chunks, first, dt);
  }
}

}  // namespace kdfast::cuda
