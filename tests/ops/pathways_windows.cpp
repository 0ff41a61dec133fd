// csrc/math/pathways.h against the definitions written out, for every small size: prints what disagrees, and how many
// comparisons there were. test_pathways_windows.py compiles it as plain C++17.
#include <cstdio>
#include <vector>

#include "csrc/math/pathways.h"

using namespace kdfast::pathways;

constexpr int kSizes = 40;
long compared = 0;

void same(const char* what, double ours, double want, int a, int b, int c) {
  ++compared;
  const double difference = ours > want ? ours - want : want - ours;
  if (!(difference <= 1e-6)) std::printf("%s(%d, %d, %d): %g, not %g\n", what, a, b, c, ours, want);  // fp32 shares
}

// Every pixel in one cell; a window its cells' pixels, and the pixels of adaptive pooling.
void side(int size, int top) {
  const Side s(size, top);
  std::vector<int> cell_of(size, -1);
  for (int cell = 0; cell < s.cells; ++cell) {
    const Range pixels = s.pixels(cell);
    for (int x = pixels.begin; x < pixels.end; ++x) {
      same("cells of a pixel", cell_of[x], -1, size, top, x);
      cell_of[x] = cell;
    }
  }
  for (int x = 0; x < size; ++x) same("cell", s.cell(x), cell_of[x], size, top, x);
  for (int level = top; level > 0; level /= 2) {
    for (int i = 0; i < level; ++i) {
      const int begin = i * size / level, end = ((i + 1) * size + level - 1) / level;
      const int window = size == 1 ? 0 : i;  // all the same, and counted once
      const Range cells = s.cells_of(level, window);
      same("extent", s.extent(level, window), end - begin, size, level, i);
      for (int x = 0; x < size; ++x) {
        const bool inside = x >= begin && x < end;
        same("window's cells", cell_of[x] >= cells.begin && cell_of[x] < cells.end, inside, size, level, i);
        const Range windows = s.windows_of(level, cell_of[x]);
        same("cell's windows", window >= windows.begin && window < windows.end, inside, size, level, i);
      }
    }
  }
}

// The mean of every window of a plane, and over_windows as its transpose.
void plane(int height, int width) {
  const int top = top_level(height);
  if (top == 0) return;
  const Pooling p(height, width, top);
  std::vector<double> d(height * width), cells(p.cells, 0.0);
  for (int i = 0; i < height * width; ++i) d[i] = (i * 37 % 101) / 50.0 - 1;
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x) cells[p.y.cell(y) * p.x.cells + p.x.cell(x)] += d[y * width + x];
  double ours = 0, want = 0, sum_of_weights = 1, ours_on_cell = 0, want_on_cell = 0;
  for (int index = 0; index < p.windows; ++index) {
    int level, area;
    const double mean = p.mean<double>(index, [&](int cell) { return cells[cell]; }, level, area);
    ours += level_weight<double>(top, level) * mean * mean / p.count(level);
  }
  double weight = 1;
  for (int level = top; level > 0; level /= 2) {
    weight /= 2, sum_of_weights += weight;
    for (int i = 0; i < level; ++i) {
      for (int j = 0; j < level; ++j) {
        const int top_row = i * height / level, end_row = ((i + 1) * height + level - 1) / level;
        const int left = j * width / level, right = ((j + 1) * width + level - 1) / level;
        double mean = 0;
        for (int y = top_row; y < end_row; ++y)
          for (int x = left; x < right; ++x) mean += d[y * width + x];
        mean /= (end_row - top_row) * (right - left);
        want += weight * mean * mean / (level * level);
        if (top_row == 0 && left == 0) want_on_cell += width == 1 ? 1.0 / level : 1.0;  // windows of one column: one
      }
    }
  }
  same("pooled", ours, want, height, width, top);
  same("total weight", total_weight<double>(top), sum_of_weights, height, width, top);
  ours_on_cell = p.over_windows<double>(p.y.cell(0) * p.x.cells + p.x.cell(0), [](int) { return 1.0; });
  same("windows of the first pixel", ours_on_cell, want_on_cell, height, width, top);
}

// Shares of an output's pixels are one in sum, and readers finds every one of them.
template <class A>
void resize(int in, int out, bool bilinear) {
  const Resize<A> r{in, out, bilinear};
  std::vector<double> found(out, 0.0);
  for (int pixel = 0; pixel < in; ++pixel) {
    const Range readers = r.readers(pixel);
    for (int o = readers.begin; o < readers.end; ++o) found[o] += r.share(o, pixel);
    for (int o = 0; o < out; ++o) {
      const bool inside = o >= readers.begin && o < readers.end;
      if (!inside) same("share outside", r.share(o, pixel), 0, in, out, pixel);
    }
  }
  for (int o = 0; o < out; ++o) {
    same("shares", found[o], 1, in, out, o);
    if (!bilinear) continue;
    const double at = (o + 0.5) * in / out - 0.5, inside = at < 0 ? 0 : at > in - 1 ? in - 1 : at;
    const Source<double> s = Resize<double>{in, out, true}.source(o);
    same("position", s.low + s.high_weight * (s.high - s.low), inside, in, out, o);
  }
}

int main() {
  for (int a = 1; a <= kSizes; ++a) {
    for (int top = 1; top <= 4; top *= 2) side(a, top);
    for (int b = 1; b <= kSizes; ++b) {
      plane(a, b);
      for (bool bilinear : {false, true}) resize<float>(a, b, bilinear), resize<double>(a, b, bilinear);
    }
  }
  std::printf("compared %ld\n", compared);
  return 0;
}
