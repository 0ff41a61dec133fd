// What pathways' CUDA kernels share: the table of pairs, a block's place in it, walks over maps in either memory
// format, resized students, and the pooling of planes in shared memory. The kernels: pathways.cuh,
// pathways_attention.cuh.
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

}  // namespace kdfast::cuda::pathways
