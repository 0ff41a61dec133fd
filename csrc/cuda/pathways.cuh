// pathways on the GPU: distances of many pairs of feature maps, and their gradients, in one launch. Windows and
// resizing: ../math/pathways.h; attention: pathways_attention.cuh.
//
//   mse: mean d^2    l1: mean |d|    hcl: [ mean d^2 + sum_l w_l mean_windows (mean_window d)^2 ] / (1 + sum_l w_l)
//   d = resized student - teacher
//
// Fused: resizing, difference, pooling at every level, the reduction, and the gradient. The pairs' table is a kernel
// argument, so nothing is copied to the device and a launch can be captured in a graph; which pathways are kept is
// read on the device. A block takes some whole planes of one pair:
//   contiguous maps of equal size   d stays in registers; for hcl, sums of `atom` neighbours of a row (the widest
//                                   power of two that no window cuts) go to shared memory, are summed over cells, and
//                                   the windows' part of the gradient comes back the same way;
//   every other layout, resizing    d is kept in shared memory plane by plane, or, for planes too large for that,
//                                   computed again from the maps where it is needed (l2 holds them).
// Sums leave a block as one number; `finish` adds them in a fixed order, so there are no atomics and the result is
// the same every time. Gradients of resized students are sums over the teacher's pixels that read a pixel: gathered.
// Memory for a pair of n elements of b bytes: forward reads 2 n b; backward reads 2 n b and writes n b, 5 passes;
// value and gradient together 3.
// Source: Chen et al. 2021 (arXiv:2104.09044).
#pragma once

#include "pathways_parts.cuh"

namespace kdfast::cuda::pathways {

// ---------------------------------------------------------------- contiguous maps of equal size
template <int G, class A, int N>
__device__ __forceinline__ void put_atoms(A* stage, const A (&d)[N], int first, int elements) {
#pragma unroll
  for (int i = 0; i < N; i += G) {
    A sum = 0;
#pragma unroll
    for (int j = i; j < i + G && j < N; ++j) sum += d[j];
    if (first + i >= 0 && first + i < elements) stage[(first + i) / G] = sum;
  }
}

template <int kDistance, class A>
__device__ __forceinline__ A term(A d) {
  return kDistance == kL1 ? (d < A(0) ? -d : d) : d * d;
}
template <int kDistance, class A>
__device__ __forceinline__ A slope(A d) {
  return kDistance != kL1 ? A(2) * d : d > A(0) ? A(1) : d < A(0) ? A(-1) : A(0);
}

template <class T, class A, int kDistance>
__device__ A contiguous(const Task<T, A>& task, A* memory) {
  constexpr int N = kChunk<T>, kRounds = kPerThread<A> / N;
  const Pair& pair = task.pair;
  const int plane = pair.mode == kFlat ? 1 : pair.height * pair.width;
  const int tile = pair.planes * plane;
  const int64_t begin = static_cast<int64_t>(task.tile) * tile;
  const int64_t left = static_cast<int64_t>(pair.samples) * pair.channels * pair.height * pair.width - begin;
  Chunks<N> chunks(task.tile, tile, pair.aligned);
  chunks.classes = left < tile ? static_cast<int>(left) : tile;
  chunks.count = (chunks.classes + chunks.offset + N - 1) / N;
  const bool whole = pair.aligned && chunks.offset == 0 && chunks.classes % N == 0;
  const T* student = static_cast<const T*>(pair.student) + begin;
  const T* teacher = static_cast<const T*>(pair.teacher) + begin;

  Vector<T> a[kRounds] = {}, b[kRounds] = {};
  const int count = task.kept ? chunks.count : 0;
  if (whole) {  // the same for every chunk of the block: the loads of all rounds are issued together
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int chunk = r * kThreads + threadIdx.x;
      if (chunk < count) a[r] = reinterpret_cast<const Vector<T>*>(student)[chunk];
      if (chunk < count) b[r] = reinterpret_cast<const Vector<T>*>(teacher)[chunk];
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int chunk = r * kThreads + threadIdx.x;
      if (chunk < count) a[r] = load(student, chunks, chunks.first(chunk), static_cast<T>(0));
      if (chunk < count) b[r] = load(teacher, chunks, chunks.first(chunk), static_cast<T>(0));
    }
  }
  A d[kRounds][N], sum = 0;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A difference = static_cast<A>(a[r].x[i]) - static_cast<A>(b[r].x[i]);
      sum += term<kDistance>(difference);
      d[r][i] = kDistance == kL1 ? slope<kDistance>(difference) : difference;  // what the gradient is made of
    }
  }

  const bool pooled = kDistance == kHcl && pair.mode == kPlanes && task.kept;
  const A unit = A(1) / (task.elements() * (kDistance == kHcl ? total_weight<A>(pair.top) : A(1)));
  A value = sum * unit;
  A* stage = memory;
  if (pooled) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int first = chunks.first(r * kThreads + threadIdx.x);
      if (pair.atom == 0) put_atoms<1>(stage, d[r], first, chunks.classes);
      else if (pair.atom == 1) put_atoms<2>(stage, d[r], first, chunks.classes);
      else if (pair.atom == 2) put_atoms<4>(stage, d[r], first, chunks.classes);
      else put_atoms<8>(stage, d[r], first, chunks.classes);
    }
    const Pooling pooling(pair.height, pair.width, pair.top);
    A* cells = stage + pair.stage;
    const Pools<A> pools{pooling, chunks.classes / plane, pair.atom, false, cells, cells + pair.planes * pooling.cells};
    const int across = pair.width >> pair.atom;
    const auto at = [&](int p, int row, int column) { return (p * pair.height + row) * across + column; };
    __syncthreads();
    pools.sum_cells([&](int p, int row, int column) { return stage[at(p, row, column)]; });
    __syncthreads();
    value += pools.distance(A(pair.samples) * A(pair.channels), task.coefficient);
    if (task.wants_gradient()) {
      __syncthreads();
      pools.each_cell([&](int p, int cell, Range rows, Range columns, int lane, int lanes, bool exists) {
        if (!exists) return;
        const A added = pools.added(p, cell);
        Pools<A>::walk(rows, columns, lane, lanes, [&](int row, int column) { stage[at(p, row, column)] = added; });
      });
      __syncthreads();
    }
  }
  if (!task.wants_gradient()) return value;

  const A factor = (kDistance == kL1 ? A(1) : A(2)) * task.coefficient * unit;
  T* by_student = static_cast<T*>(pair.student_grad) + begin;
  T* by_teacher = static_cast<T*>(pair.teacher_grad) + begin;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int chunk = r * kThreads + threadIdx.x;
    if (chunk >= chunks.count) break;
    const int first = chunks.first(chunk);
    Vector<T> plus, minus;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A g = factor * d[r][i];
      if (pooled && chunks.inside(first + i)) g += stage[(first + i) >> pair.atom];
      plus.x[i] = static_cast<T>(g), minus.x[i] = static_cast<T>(-g);
    }
    if (pair.student_grad != nullptr) store(by_student, chunks, first, plus);
    if (pair.teacher_grad != nullptr) store(by_teacher, chunks, first, minus);
  }
  return value;
}

// ---------------------------------------------------------------- every layout, every size
// d of some channels of one sample, [planes][pixels], in shared memory or wherever it can be computed from.
template <class T, class A, int kDistance>
struct Maps {
  const Task<T, A>& task;
  Student<T, A> student;
  const T* teacher;
  Layout layout;          // the teacher's
  int planes, stride;     // of the stage, odd: neighbouring planes lie in different banks
  A* stage;               // or null
  A factor;               // gradient of a pixel for a slope of one
  bool pooled;

  __device__ A difference(int channel, int y, int x) const {
    return student.at(channel, y, x) - static_cast<A>(teacher[layout.at(channel, y, x)]);
  }
  // What the stage keeps: where the gradient is elementwise, that.
  __device__ A kept(A d) const { return pooled ? d : factor * slope<kDistance>(d); }

  // A chunk of channels of a pixel, 16 bytes of each map: visit(first channel, pixel).
  template <class Visit>
  __device__ void each_vector(const Visit& visit) const {
    constexpr int N = kChunk<T>;
    const int across = planes / N, all = across * layout.height * layout.width;
    Counter at(threadIdx.x, kThreads, across, layout.height * layout.width);
#pragma unroll 4
    for (int i = threadIdx.x; i < all; i += kThreads, at.next()) visit(at.digit[0] * N, at.digit[1]);
  }

  // Fills the stage; returns this thread's sum of terms.
  __device__ A read() const {
    A sum = 0;
    if (kDistance == kHcl && task.pair.vectors) {
      each_vector([&](int channel, int pixel) {
        constexpr int N = kChunk<T>;
        const int at = pixel * layout.channels + channel;
        const Vector<T> a = *reinterpret_cast<const Vector<T>*>(student.data + at);
        const Vector<T> b = *reinterpret_cast<const Vector<T>*>(teacher + at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A d = static_cast<A>(a.x[i]) - static_cast<A>(b.x[i]);
          sum += term<kDistance>(d);
          stage[(channel + i) * stride + pixel] = kept(d);
        }
      });
    } else {
      layout.each(planes, [&](Place p) {
        const A d = difference(p.channel, p.y, p.x);
        sum += term<kDistance>(d);
        if (stage != nullptr) stage[p.channel * stride + p.y * layout.width + p.x] = kept(d);
      });
    }
    return sum;
  }

  // Writes both gradients; gradient(channel, y, x) is that of a pixel as the teacher sees it.
  template <class Gradient>
  __device__ void write(T* by_student, T* by_teacher, const Gradient& gradient) const {
    if (kDistance == kHcl && task.pair.vectors) {
      each_vector([&](int channel, int pixel) {
        constexpr int N = kChunk<T>;
        Chunks<N> whole(0, N, true);
        Vector<T> plus, minus;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A g = task.kept ? stage[(channel + i) * stride + pixel] : A(0);
          plus.x[i] = static_cast<T>(g), minus.x[i] = static_cast<T>(-g);
        }
        const int at = pixel * layout.channels + channel;
        if (by_student != nullptr) store(by_student + at, whole, 0, plus);
        if (by_teacher != nullptr) store(by_teacher + at, whole, 0, minus);
      });
      return;
    }
    if (by_teacher != nullptr) {
      layout.each(planes, [&](Place p) {
        by_teacher[layout.at(p.channel, p.y, p.x)] = static_cast<T>(-gradient(p.channel, p.y, p.x));
      });
    }
    if (by_student != nullptr) {
      student.layout.each(planes, [&](Place p) {
        const A g = student.gather(p.y, p.x, [&](int y, int x) { return gradient(p.channel, y, x); });
        by_student[student.layout.at(p.channel, p.y, p.x)] = static_cast<T>(g);
      });
    }
  }
};

template <class T, class A, int kDistance>
__device__ A any_layout(const Call<T, A>& call, const Task<T, A>& task, A* memory) {
  const Pair& pair = task.pair;
  const int groups = (pair.channels + pair.planes - 1) / pair.planes;
  const int64_t sample = task.tile / groups;
  const int channel = (task.tile - static_cast<int>(sample) * groups) * pair.planes;
  const int pixels = pair.height * pair.width;
  const Layout layout{pair.channels, pair.height, pair.width, pair.teacher_last};
  const Student<T, A> student = student_of(call, pair, sample, channel);
  const int64_t teacher_at = sample * pair.channels * pixels + layout.at(channel, 0, 0);
  const int64_t student_at = student.data - static_cast<const T*>(pair.student);
  const A unit = A(1) / (task.elements() * (kDistance == kHcl ? total_weight<A>(pair.top) : A(1)));
  const Maps<T, A, kDistance> maps{task,
                                   student,
                                   static_cast<const T*>(pair.teacher) + teacher_at,
                                   layout,
                                   least(pair.planes, pair.channels - channel),
                                   pixels | 1,
                                   pair.stage > 0 ? memory : nullptr,
                                   task.coefficient * unit,
                                   kDistance == kHcl && pair.top > 0};
  A value = 0;
  if (task.kept) value = unit * maps.read();
  __syncthreads();

  const Pooling pooling(pair.height, pair.width, most(pair.top, 1));
  A* cells = memory + pair.stage;
  const Pools<A> pools{pooling, maps.planes, 0, true, cells, cells + pair.planes * pooling.cells};
  if (maps.pooled && task.kept) {
    const auto at = [&](int p, int row, int column) { return p * maps.stride + row * pair.width + column; };
    pools.sum_cells([&](int p, int row, int column) {
      return maps.stage != nullptr ? maps.stage[at(p, row, column)] : maps.difference(p, row, column);
    });
    __syncthreads();
    value += pools.distance(A(pair.samples) * A(pair.channels), task.coefficient);
    if (task.wants_gradient()) {
      __syncthreads();
      pools.each_cell([&](int p, int cell, Range rows, Range columns, int lane, int lanes, bool exists) {
        if (!exists) return;
        const A added = pools.added(p, cell);
        if (maps.stage == nullptr) cells[p * pooling.cells + cell] = added;  // every lane the same
        else Pools<A>::walk(rows, columns, lane, lanes, [&](int row, int column) {
          A& d = maps.stage[at(p, row, column)];
          d = A(2) * maps.factor * d + added;
        });
      });
      __syncthreads();
    }
  }
  if (!task.wants_gradient()) return value;
  T* by_student = static_cast<T*>(pair.student_grad);
  T* by_teacher = static_cast<T*>(pair.teacher_grad);
  maps.write(by_student != nullptr ? by_student + student_at : nullptr,
             by_teacher != nullptr ? by_teacher + teacher_at : nullptr, [&](int c, int y, int x) {
               if (!task.kept) return A(0);
               if (maps.stage != nullptr) return maps.stage[c * maps.stride + y * pair.width + x];
               const A g = maps.factor * slope<kDistance>(maps.difference(c, y, x));
               const int cell = pooling.y.cell(y) * pooling.x.cells + pooling.x.cell(x);
               return maps.pooled ? g + cells[c * pooling.cells + cell] : g;
             });
  return value;
}

// ---------------------------------------------------------------- kernels
template <class A>
__device__ A* dynamic_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<A*>(memory);
}

// A block's share of the distance, of which `finish` makes the sum.
template <class T, class A>
__device__ void leave(const Call<T, A>& call, A value) {
  A sums[1] = {value};
  block_sum(sums);
  if (threadIdx.x == 0) call.partials[blockIdx.x] = sums[0];
}

template <class T, class A, int kDistance, bool kAny>
__global__ void __launch_bounds__(kThreads, kBlocks<A, kAny>) pixels(const __grid_constant__ Call<T, A> call) {
  const Task<T, A> task(call);
  if (!task.kept && !task.wants_gradient()) return;
  const A value = kAny && task.pair.mode == kAnyLayout
                      ? any_layout<T, A, kDistance>(call, task, dynamic_memory<A>())
                      : contiguous<T, A, kDistance>(task, dynamic_memory<A>());
  if (call.partials != nullptr && task.kept) leave(call, value);
}

// distances[p] = sum of the partials of pair p's blocks. One block a pair.
template <class T, class A>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Call<T, A> call, int blocks) {
  const int p = blockIdx.x;
  const bool kept = call.keep == nullptr || call.keep[p];
  const int end = p + 1 < call.count ? call.pairs[p + 1].first_block : blocks;
  A sums[1] = {0};
  if (kept)
    for (int i = call.pairs[p].first_block + threadIdx.x; i < end; i += kThreads) sums[0] += call.partials[i];
  block_sum(sums);
  if (threadIdx.x == 0) call.distances[p] = sums[0];
}

}  // namespace kdfast::cuda::pathways
