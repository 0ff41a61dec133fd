// pathways, pixel by pixel: windows, resizing and their inverses for its kernels. Torch-free, host and device;
// A is float or double.
//
//   hcl(d) = [ mean d^2 + sum_l w_l mean_windows (mean_window d)^2 ] / (1 + sum_l w_l),   l in 4, 2, 1 below the height
//
// Adaptive pooling gives a side of n pixels the windows [floor(i n / l), ceil((i + 1) n / l)), which overlap where l
// does not divide n, and then by one pixel. The ends of the finest level's windows are the ends of all windows, so
// they cut the side into cells: `top` of them, or 2 top - 1 with the shared pixels as cells of their own. A window is
// a run of cells, and what the windows add to the gradient is constant over a cell:
//
//   d hcl / d d_xy = [ 2 d_xy / (NCHW) + sum of windows over xy: 2 w_l m / (N C count_l area) ] / (1 + sum_l w_l)
//
// so a plane is pooled by summing its cells once, and each pixel is touched once more for its gradient.
// Memory: none beyond the plane's own; cells and windows are at most 49 + 21 numbers a plane.
// Source: Chen et al. 2021 (arXiv:2104.09044); resizing as torch.nn.functional.interpolate.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define KDFAST_HD __host__ __device__ __forceinline__
#else
#define KDFAST_HD inline
#endif

namespace kdfast::pathways {

enum Distance : int { kMse = 0, kL1 = 1, kHcl = 2, kAttention = 3 };
enum ResizeMode : int { kNearest = 0, kBilinear = 1 };

KDFAST_HD int least(int a, int b) { return a < b ? a : b; }
KDFAST_HD int most(int a, int b) { return a > b ? a : b; }

// ---------------------------------------------------------------- levels
// The finest level a map of this height is pooled to; 0: none.
KDFAST_HD int top_level(int height) { return height > 4 ? 4 : height > 2 ? 2 : height > 1 ? 1 : 0; }

// Weights 1/2, 1/4, 1/8 from the finest level used.
template <class A>
KDFAST_HD A level_weight(int top, int level) {
  return A(level) / A(2 * top);
}
template <class A>
KDFAST_HD A total_weight(int top) {
  return top == 0 ? A(1) : A(1) + A(2 * top - 1) / A(2 * top);
}

struct Range {
  int begin, end;
};

// One side of a map: its cells and windows. top >= 1.
struct Side {
  int size, top, shift, cells;  // shift: log2(top)
  bool exact;                   // the level divides the side

  KDFAST_HD Side(int size, int top)
      : size(size), top(top), shift(top == 4 ? 2 : top == 2 ? 1 : 0), exact((size & (top - 1)) == 0) {
    cells = whole() ? 1 : exact ? top : 2 * top - 1;
  }
  // Every window is the whole side: one level, or one pixel, whose windows are all the same and count as one.
  KDFAST_HD bool whole() const { return top == 1 || size == 1; }
  KDFAST_HD int windows(int level) const { return size == 1 ? 1 : level; }

  KDFAST_HD Range pixels(int cell) const {
    if (whole()) return {0, size};
    if (exact) return {(cell * size) >> shift, ((cell + 1) * size) >> shift};
    const int m = cell >> 1, next = (m + 1) * size;
    if (cell & 1) return {next >> shift, (next + top - 1) >> shift};
    return {(m * size + top - 1) >> shift, next >> shift};
  }
  KDFAST_HD int cell(int pixel) const {
    if (whole()) return 0;
    const int of_top = top * pixel;
    int window = 0;
    for (int i = 1; i < top; ++i) window += of_top >= i * size ? 1 : 0;
    if (exact) return window;
    return 2 * window + (of_top + top > (window + 1) * size ? 1 : 0);
  }
  KDFAST_HD Range cells_of(int level, int window) const {
    if (whole()) return {0, 1};
    const int finest = top / level;  // windows of the finest level a window of this one spans
    if (exact) return {window * finest, (window + 1) * finest};
    return {most(2 * window * finest - 1, 0), least(2 * (window + 1) * finest, cells)};
  }
  KDFAST_HD Range windows_of(int level, int cell) const {
    if (whole()) return {0, 1};
    const int finest = top / level;
    if (exact) return {cell / finest, cell / finest + 1};
    return {(cell >> 1) / finest, ((cell + 1) >> 1) / finest + 1};
  }
  KDFAST_HD int extent(int level, int window) const {
    if (size == 1) return 1;
    return ((window + 1) * size + level - 1) / level - (window * size) / level;
  }
};

// How a plane is pooled.
struct Pooling {
  Side y, x;
  int cells, windows;  // of all levels, the finest first

  KDFAST_HD Pooling(int height, int width, int top) : y(height, top), x(width, top), windows(0) {
    cells = y.cells * x.cells;
    for (int level = top; level > 0; level /= 2) windows += count(level);
  }
  KDFAST_HD int count(int level) const { return y.windows(level) * x.windows(level); }

  // Sums the cells of window number `index`: sum(cell) is asked for each. Returns the window's mean, and by reference
  // its level and its area.
  template <class A, class Sum>
  KDFAST_HD A mean(int index, const Sum& sum, int& level, int& area) const {
    level = y.top;
    while (index >= count(level)) index -= count(level), level /= 2;
    const int across = x.windows(level), i = index / across, j = index % across;
    const Range rows = y.cells_of(level, i), columns = x.cells_of(level, j);
    A all = 0;
    for (int r = rows.begin; r < rows.end; ++r)
      for (int c = columns.begin; c < columns.end; ++c) all += sum(r * x.cells + c);
    area = y.extent(level, i) * x.extent(level, j);
    return all / A(area);
  }
  // Sums over the windows that contain a cell.
  template <class A, class Of>
  KDFAST_HD A over_windows(int cell, const Of& of) const {
    const int r = cell / x.cells, c = cell % x.cells;
    A all = 0;
    int first = 0;
    for (int level = y.top; level > 0; first += count(level), level /= 2) {
      const Range rows = y.windows_of(level, r), columns = x.windows_of(level, c);
      for (int i = rows.begin; i < rows.end; ++i)
        for (int j = columns.begin; j < columns.end; ++j) all += of(first + i * x.windows(level) + j);
    }
    return all;
  }
};

// ---------------------------------------------------------------- resizing
// An output pixel is low + high_weight (high - low) of the input's; for nearest low alone.
template <class A>
struct Source {
  int low, high;
  A high_weight;
};

// One side of a resized map. Nearest rounds in fp32 for every type, as PyTorch does.
template <class A>
struct Resize {
  int in, out;
  bool bilinear;

  KDFAST_HD Source<A> source(int pixel) const {
    if (!bilinear) {
      const float scale = static_cast<float>(in) / static_cast<float>(out);
      const int low = least(static_cast<int>(floorf(static_cast<float>(pixel) * scale)), in - 1);
      return {low, low, A(0)};
    }
    const A at = A(in) / A(out) * (A(pixel) + A(0.5)) - A(0.5);
    const A inside = at < A(0) ? A(0) : at;
    const int low = least(static_cast<int>(inside), in - 1);
    return {low, least(low + 1, in - 1), inside - A(low)};
  }
  // The first output pixel whose low is `pixel` or more: where the gradient's sum over outputs begins.
  KDFAST_HD int first(int pixel) const {
    if (pixel <= 0) return 0;
    if (pixel >= in) return out;
    int guess = static_cast<int>(static_cast<float>(pixel) / static_cast<float>(in) * static_cast<float>(out));
    guess = most(0, least(guess, out));
    while (guess > 0 && source(guess - 1).low >= pixel) --guess;
    while (guess < out && source(guess).low < pixel) ++guess;
    return guess;
  }
  // The output pixels that read this input pixel, ...
  KDFAST_HD Range readers(int pixel) const { return {first(bilinear ? pixel - 1 : pixel), first(pixel + 1)}; }
  // ... and how much of it one takes.
  KDFAST_HD A share(int output, int pixel) const {
    const Source<A> s = source(output);
    return (s.low == pixel ? A(1) - s.high_weight : A(0)) + (s.high == pixel ? s.high_weight : A(0));
  }
};

}  // namespace kdfast::pathways
