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

#include "../math/pathways.h"
#include "rows.cuh"

namespace kdfast::cuda::pathways {

using namespace kdfast::pathways;

constexpr int kMaxPairs = 32;  // pairs a launch: their table is the kernel's argument, of at most 4 KiB
constexpr int kThreads = 256;
template <class A>
constexpr int kPerThread = sizeof(A) == 4 ? 16 : 8;  // elements of d a thread keeps in registers
template <class A>
constexpr int kTile = kThreads * kPerThread<A>;
// Blocks a multiprocessor at least: 64 registers where all pairs of a launch are contiguous and of equal size, else 80;
// fp64 wants up to 120.
template <class A, bool kAny>
constexpr int kBlocks = sizeof(A) == 8 ? 2 : kAny ? 3 : 4;

enum Mode : unsigned char { kFlat, kPlanes, kAnyLayout };

struct Pair {
  const void *student, *teacher;       // [samples, channels, in_height, in_width], [samples, .., height, width]
  void *student_grad, *teacher_grad;   // the same shapes and memory formats, or null
  int samples, channels, teacher_channels;
  int height, width, in_height, in_width;
  int first_block, planes;             // planes a block
  int stage;                           // numbers of shared memory for d or its atoms; 0: not kept
  Mode mode;
  unsigned char atom, top;             // log2 of the elements an atom sums; hcl's finest level
  bool student_last, teacher_last;     // channels_last
  bool aligned;                        // all pointers to 16 bytes
  bool vectors;                        // kAnyLayout: 16 bytes of channels at a time; attention: of the innermost side
};

template <class T, class A>
struct Call {
  using Storage = T;
  using Sum = A;
  Pair pairs[kMaxPairs];
  const bool* keep;                    // [count], or null
  Column<A> coefficient;               // [count], or null where no gradient is asked for
  A *partials, *distances;             // [blocks], or null; [count]
  A* scratch;                          // attention: maps too large for shared memory
  int count;
  bool bilinear;
};

// The pair a block works on, and its share of it.
template <class T, class A>
struct Task {
  const Pair& pair;
  int index, tile;
  bool kept;
  A coefficient;

  __device__ static int find(const Call<T, A>& call) {
    int p = 0;
    while (p + 1 < call.count && static_cast<int>(blockIdx.x) >= call.pairs[p + 1].first_block) ++p;
    return p;
  }
  __device__ explicit Task(const Call<T, A>& call) : pair(call.pairs[find(call)]) {
    index = static_cast<int>(&pair - call.pairs);
    tile = static_cast<int>(blockIdx.x) - pair.first_block;
    kept = call.keep == nullptr || call.keep[index];
    coefficient = call.coefficient.data != nullptr && kept ? call.coefficient.at(index) : A(0);
  }
  __device__ bool wants_gradient() const { return pair.student_grad != nullptr || pair.teacher_grad != nullptr; }
  __device__ A elements() const {
    return A(pair.samples) * A(pair.channels) * A(pair.height) * A(pair.width);
  }
};

// Sums over the block, the same in every thread.
template <int K, class A>
__device__ void block_sum(A (&sums)[K]) {
  __shared__ A of_warp[K][kThreads / kWarp];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums[k] = sum_over(sums[k], kWarp);
    if (threadIdx.x % kWarp == 0) of_warp[k][threadIdx.x / kWarp] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums[k] = 0;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) sums[k] += of_warp[k][w];
  }
}

// ---------------------------------------------------------------- walking a map
// A number of three digits, the first the fastest, that a block counts through together.
struct Counter {
  int digit[3], radix[2], step[3];

  __device__ Counter(int start, int by, int first, int second) : radix{first, second} {
    split(start, digit), split(by, step);
  }
  __device__ void split(int number, int (&out)[3]) const {
    const int rest = number / radix[0];
    out[0] = number - rest * radix[0], out[2] = rest / radix[1], out[1] = rest - out[2] * radix[1];
  }
  __device__ void next() {
    digit[0] += step[0], digit[1] += step[1], digit[2] += step[2];
    if (digit[0] >= radix[0]) digit[0] -= radix[0], ++digit[1];
    if (digit[1] >= radix[1]) digit[1] -= radix[1], ++digit[2];
  }
};

struct Place {
  int channel, y, x;
};

// One sample of a map in either memory format, from some channel on.
struct Layout {
  int channels, height, width;
  bool last;

  __device__ int at(int channel, int y, int x) const {
    return last ? (y * width + x) * channels + channel : (channel * height + y) * width + x;
  }
  // Visits `count` channels' pixels in the order they lie in memory: visit(place).
  template <class Visit>
  __device__ void each(int count, const Visit& visit) const {
    Counter at = last ? Counter(threadIdx.x, kThreads, count, width) : Counter(threadIdx.x, kThreads, width, height);
    const int all = count * height * width;
    for (int i = threadIdx.x; i < all; i += kThreads, at.next()) {
      const int* digit = at.digit;
      visit(last ? Place{digit[0], digit[2], digit[1]} : Place{digit[2], digit[1], digit[0]});
    }
  }
};

// The student's map as the teacher's pixels see it.
template <class T, class A>
struct Student {
  const T* data;
  Layout layout;
  Resize<A> y, x;
  bool same;

  __device__ A at(int channel, int row, int column) const {
    if (same) return static_cast<A>(data[layout.at(channel, row, column)]);
    const Source<A> sy = y.source(row), sx = x.source(column);
    const A corner = static_cast<A>(data[layout.at(channel, sy.low, sx.low)]);
    if (!y.bilinear) return corner;
    const A right = static_cast<A>(data[layout.at(channel, sy.low, sx.high)]);
    const A below = static_cast<A>(data[layout.at(channel, sy.high, sx.low)]);
    const A across = static_cast<A>(data[layout.at(channel, sy.high, sx.high)]);
    return (A(1) - sy.high_weight) * ((A(1) - sx.high_weight) * corner + sx.high_weight * right) +
           sy.high_weight * ((A(1) - sx.high_weight) * below + sx.high_weight * across);
  }
  // The gradient of one of its pixels: of(row, column) is the gradient of what the teacher's pixel sees. `of` stands
  // here once: twice, and its registers spill.
  template <class Of>
  __device__ A gather(int row, int column, const Of& of) const {
    const Range rows = same ? Range{row, row + 1} : y.readers(row);
    const Range columns = same ? Range{column, column + 1} : x.readers(column);
    A sum = 0;
#pragma unroll 1
    for (int r = rows.begin; r < rows.end; ++r) {
      const A by_row = same ? A(1) : y.share(r, row);
#pragma unroll 1
      for (int c = columns.begin; c < columns.end; ++c) {
        sum += by_row * (same ? A(1) : x.share(c, column)) * of(r, c);
      }
    }
    return sum;
  }
};

template <class T, class A>
__device__ Student<T, A> student_of(const Call<T, A>& call, const Pair& pair, int64_t sample, int channel) {
  const Layout layout{pair.channels, pair.in_height, pair.in_width, pair.student_last};
  const int64_t size = static_cast<int64_t>(pair.channels) * pair.in_height * pair.in_width;
  return {static_cast<const T*>(pair.student) + sample * size + layout.at(channel, 0, 0),
          layout,
          {pair.in_height, pair.height, call.bilinear},
          {pair.in_width, pair.width, call.bilinear},
          pair.in_height == pair.height && pair.in_width == pair.width};
}

// ---------------------------------------------------------------- pooling
// A block's planes, pooled: cells[plane][cell] and windows[plane][window] in shared memory.
template <class A>
struct Pools {
  Pooling pooling;
  int planes, atom;      // log2 of the columns a stage element stands for
  bool plane_first;      // neighbouring lanes take neighbouring planes rather than cells
  A *cells, *windows;

  // For each cell, shared by 1 to 32 lanes: visit(plane, cell, rows, columns, lane, lanes), every lane calling.
  template <class Visit>
  __device__ void each_cell(const Visit& visit) const {
    const int tasks = planes * pooling.cells;
    int lanes = 1;
    while (lanes < kWarp && 2 * lanes * tasks <= kThreads) lanes *= 2;
    const int step = kThreads / lanes, lane = threadIdx.x & (lanes - 1);
    for (int begin = 0; begin < tasks; begin += step) {
      const int task = begin + static_cast<int>(threadIdx.x) / lanes;
      const int divisor = plane_first ? planes : pooling.cells;
      const int rest = task / divisor, first = task - rest * divisor;
      const int plane = plane_first ? first : rest, cell = plane_first ? rest : first;
      const int row = cell / pooling.x.cells, column = cell - row * pooling.x.cells;
      Range rows = pooling.y.pixels(row), columns = pooling.x.pixels(column);
      columns = {columns.begin >> atom, columns.end >> atom};
      if (task >= tasks || columns.end <= columns.begin) rows.end = rows.begin;
      visit(plane, cell, rows, columns, lane, lanes, task < tasks);
    }
  }
  // One lane's part of a cell, in stage elements.
  template <class Visit>
  __device__ static void walk(Range rows, Range columns, int lane, int lanes, const Visit& visit) {
    const int width = columns.end - columns.begin;
    int row = rows.begin, column = lane;
    while (row < rows.end) {
      if (column < width) visit(row, columns.begin + column), column += lanes;
      while (column >= width && row < rows.end) column -= width, ++row;
    }
  }

  template <class Get>
  __device__ void sum_cells(const Get& get) const {
    each_cell([&](int plane, int cell, Range rows, Range columns, int lane, int lanes, bool exists) {
      A sum = 0;
      walk(rows, columns, lane, lanes, [&](int row, int column) { sum += get(plane, row, column); });
      sum = sum_over(sum, lanes);
      if (exists && lane == 0) cells[plane * pooling.cells + cell] = sum;
    });
  }
  // Returns this thread's part of the distance; leaves in `windows` what a window adds to its pixels' gradient.
  __device__ A distance(A all_planes, A coefficient) const {
    const int top = pooling.y.top;
    const A unit = A(1) / (total_weight<A>(top) * all_planes);
    A value = 0;
    for (int t = threadIdx.x; t < planes * pooling.windows; t += kThreads) {
      const int plane = t / pooling.windows;
      const A* sums = cells + plane * pooling.cells;
      int level, area;
      const A mean = pooling.template mean<A>(
          t - plane * pooling.windows, [&](int cell) { return sums[cell]; }, level, area);
      const A weight = unit * level_weight<A>(top, level) / A(pooling.count(level));
      value += weight * mean * mean;
      windows[t] = A(2) * weight * coefficient * mean / A(area);
    }
    return value;
  }
  // What the windows add to the gradient of each of a cell's pixels.
  __device__ A added(int plane, int cell) const {
    const A* of_plane = windows + plane * pooling.windows;
    return pooling.template over_windows<A>(cell, [&](int window) { return of_plane[window]; });
  }
};

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
               return maps.pooled ? g + cells[c * pooling.cells + pooling.y.cell(y) * pooling.x.cells + pooling.x.cell(x)]
                                  : g;
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
