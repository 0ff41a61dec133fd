// The distances of one tile and their gradients. See pathways.cpp for the formulas.
#pragma once

#include "pathways_maps.h"

namespace kdfast::cpu {

template <class S>
using Wide = decltype(widen(S{}));  // the type of the arithmetic

// mse and l1: sum of d^2 or |d| over n elements in any order, and factor times its gradient in a (2 d or sign d) into da,
// minus that into db; both may be null. Blocks stay in cache between the sum and the gradient.
template <bool kL1, class S, class A = Wide<S>>
KDFAST_INLINE double flat(const S* a, const S* b, S* da, S* db, int64_t n, A factor) {
  double total = 0;
  const auto gradient = [&](S* out, int64_t begin, int64_t end, A f) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const A d = widen(a[i]) - widen(b[i]);
      narrow(kL1 ? (d > A(0) ? f : d < A(0) ? -f : A(0)) : f * d, out + i);
    }
  };
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) {
      const A d = widen(a[i]) - widen(b[i]);
      sum += kL1 ? std::abs(d) : d * d;
    }
    total += sum;
    if (da != nullptr) gradient(da, begin, end, kL1 ? factor : 2 * factor);
    if (db != nullptr) gradient(db, begin, end, kL1 ? -factor : -2 * factor);
  }
  return total;
}

// hcl. The windows of all levels cut a side into segments, at most 7; within a cell (a segment of rows times one of
// columns) every position lies in the same windows. So a tile is swept twice: sums over cells; then, the windows' means
// made of them, the gradient, which is a multiple of d plus one number for each cell.
constexpr int kLevels = 3, kSegments = 7;

struct Side {
  int64_t count = 0, begin[kSegments + 1];                      // segments
  int64_t first[kLevels][4], last[kLevels][4], size[kLevels][4];  // of window i of a level: segments [first, last), positions
};

struct Hcl {
  int levels = 0;
  int64_t level[kLevels];
  double share[kLevels], total = 1;  // weights of the levels used, and the sum of all weights
  Side rows, columns;

  Hcl(int64_t height, int64_t width) {
    for (const int64_t l : {4, 2, 1}) {
      if (l >= height) continue;
      level[levels] = l;
      share[levels] = std::ldexp(1.0, -(levels + 1));
      total += share[levels++];
    }
    cut(height, rows);
    cut(width, columns);
  }

 private:
  void cut(int64_t size, Side& side) {
    std::vector<int64_t> bounds{0, size};
    const auto begin = [&](int64_t l, int64_t i) { return i * size / l; };  // as PyTorch's adaptive pooling has them
    const auto end = [&](int64_t l, int64_t i) { return ((i + 1) * size + l - 1) / l; };
    for (int k = 0; k < levels; ++k) {
      for (int64_t i = 0; i < level[k]; ++i) bounds.insert(bounds.end(), {begin(level[k], i), end(level[k], i)});
    }
    std::sort(bounds.begin(), bounds.end());
    bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
    side.count = static_cast<int64_t>(bounds.size()) - 1;
    std::copy(bounds.begin(), bounds.end(), side.begin);
    const auto segment = [&](int64_t at) { return std::find(bounds.begin(), bounds.end(), at) - bounds.begin(); };
    for (int k = 0; k < levels; ++k) {
      for (int64_t i = 0; i < level[k]; ++i) {
        const int64_t from = begin(level[k], i), to = end(level[k], i);
        side.first[k][i] = segment(from), side.last[k][i] = segment(to), side.size[k][i] = to - from;
      }
    }
  }
};

// Tiles of a and b in the same order, and where the gradients go (null where none is asked for).
template <class S>
struct Pair {
  Tile<const S> a, b;
  S *da, *db;
};

// The columns' segments: for the widths compiled for, a quarter each.
template <int64_t kWidth>
struct Columns {
  const Side& side;
  int64_t count() const { return kWidth > 0 ? 4 : side.count; }
  int64_t begin(int64_t i) const { return kWidth > 0 ? i * (kWidth / 4) : side.begin[i]; }
  int64_t width() const { return begin(count()); }
};

// First sweep, planes: cells[cell * channels + c] = sum of d; returns the sum of d^2. line: two rows.
template <int64_t kWidth, class S, class A = Wide<S>>
KDFAST_INLINE double plane_sums(const Pair<S>& x, const Hcl& h, A* cells, A* line) {
  const Columns<kWidth> columns{h.columns};
  const int64_t channels = x.a.channels, width = columns.width();
  A registers[2 * kWidth + 1];
  A *const sums = kWidth > 0 ? registers : line, *const squares = sums + width;
  double total = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const S *a = x.a.data + c * x.a.channel_stride, *b = x.b.data + c * x.b.channel_stride;
    for (int64_t i = 0; i < width; ++i) squares[i] = 0;
    for (int64_t row = 0; row < h.rows.count; ++row) {
      for (int64_t i = 0; i < width; ++i) sums[i] = 0;
      for (int64_t y = h.rows.begin[row]; y < h.rows.begin[row + 1]; ++y, a += width, b += width) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          const A d = widen(a[i]) - widen(b[i]);
          sums[i] += d;
          squares[i] += d * d;
        }
      }
      for (int64_t column = 0; column < columns.count(); ++column) {
        A sum = 0;
        for (int64_t i = columns.begin(column); i < columns.begin(column + 1); ++i) sum += sums[i];
        cells[(row * columns.count() + column) * channels + c] = sum;
      }
    }
    A square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; ++i) square += squares[i];
    total += square;
  }
  return total;
}

// The same, interleaved. line: one number a channel.
template <class S, class A = Wide<S>>
KDFAST_INLINE double interleaved_sums(const Pair<S>& x, const Hcl& h, A* cells, A* line) {
  constexpr int64_t kFlush = 512;  // squares summed in the type of the arithmetic before they join the fp64 total
  const int64_t channels = x.a.channels, stride = x.a.position_stride;
  const S *a = x.a.data, *b = x.b.data;
  std::fill_n(cells, h.rows.count * h.columns.count * channels, A(0));
  std::fill_n(line, channels, A(0));
  double total = 0;
  int64_t waiting = 0;
  for (int64_t row = 0; row < h.rows.count; ++row) {
    for (int64_t y = h.rows.begin[row]; y < h.rows.begin[row + 1]; ++y) {
      for (int64_t column = 0; column < h.columns.count; ++column) {
        A* const cell = cells + (row * h.columns.count + column) * channels;
        for (int64_t i = h.columns.begin[column]; i < h.columns.begin[column + 1]; ++i, a += stride, b += stride) {
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) {
            const A d = widen(a[c]) - widen(b[c]);
            cell[c] += d;
            line[c] += d * d;
          }
        }
      }
      waiting += h.columns.begin[h.columns.count];
      if (waiting >= kFlush || y + 1 == h.rows.begin[h.rows.count]) {
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; ++c) sum += line[c], line[c] = 0;
        total += sum;
        waiting = 0;
      }
    }
  }
  return total;
}

// Between the sweeps: from the cells' sums of d the windows' means m; returns the sum of part_k m^2, and makes terms, for
// each cell the sum over its windows of factor * 2 part_k m / positions. mean: one number a channel.
template <class A>
KDFAST_INLINE double windows(const Hcl& h, const double* part, double factor, int64_t channels, const A* cells, A* terms, A* mean) {
  const Side &rows = h.rows, &columns = h.columns;
  std::fill_n(terms, rows.count * columns.count * channels, A(0));
  double total = 0;
  for (int k = 0; k < h.levels; ++k) {
    A squares = 0;
    for (int64_t i = 0; i < h.level[k]; ++i) {
      for (int64_t j = 0; j < h.level[k]; ++j) {
        const A inverse = A(1) / static_cast<A>(rows.size[k][i] * columns.size[k][j]);
        const auto over_cells = [&](const auto& body) {
          for (int64_t r = rows.first[k][i]; r < rows.last[k][i]; ++r) {
            for (int64_t s = columns.first[k][j]; s < columns.last[k][j]; ++s) body((r * columns.count + s) * channels);
          }
        };
        std::fill_n(mean, channels, A(0));
        over_cells([&](int64_t cell) {
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) mean[c] += cells[cell + c];
        });
        const A term = static_cast<A>(2 * factor * part[k]) * inverse;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < channels; ++c) {
          mean[c] *= inverse;
          squares += mean[c] * mean[c];
          mean[c] *= term;
        }
        over_cells([&](int64_t cell) {
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) terms[cell + c] += mean[c];
        });
      }
    }
    total += part[k] * static_cast<double>(squares);
  }
  return total;
}

// The same where 4 divides both sides: 4x4 cells, which are the windows of the first level.
template <class A>
KDFAST_INLINE double quarter_windows(const Hcl& h, const double* part, double factor, int64_t channels, const A* cells, A* terms) {
  const A positions = static_cast<A>(h.rows.size[0][0] * h.columns.size[0][0]);
  const A inverse[3] = {1 / positions, A(0.25) / positions, A(0.0625) / positions};
  A term[3];
  for (int k = 0; k < 3; ++k) term[k] = static_cast<A>(2 * factor * part[k]) * inverse[k] * inverse[k];
  A squares_4 = 0, squares_2 = 0, squares_1 = 0;
#pragma omp simd reduction(+ : squares_4, squares_2, squares_1)
  for (int64_t c = 0; c < channels; ++c) {
    A quarter[4], all = 0;
    for (int q = 0; q < 4; ++q) {
      const A* corner = cells + ((q / 2) * 8 + (q % 2) * 2) * channels + c;
      const A s0 = corner[0], s1 = corner[channels], s2 = corner[4 * channels], s3 = corner[5 * channels];
      quarter[q] = (s0 + s1) + (s2 + s3);
      squares_4 += (s0 * s0 + s1 * s1) + (s2 * s2 + s3 * s3);
      squares_2 += quarter[q] * quarter[q];
      all += quarter[q];
    }
    squares_1 += all * all;
    for (int q = 0; q < 4; ++q) {
      const int64_t at = ((q / 2) * 8 + (q % 2) * 2) * channels + c;
      const A common = term[1] * quarter[q] + term[2] * all;
      terms[at] = term[0] * cells[at] + common;
      terms[at + channels] = term[0] * cells[at + channels] + common;
      terms[at + 4 * channels] = term[0] * cells[at + 4 * channels] + common;
      terms[at + 5 * channels] = term[0] * cells[at + 5 * channels] + common;
    }
  }
  const double squares[3] = {squares_4, squares_2, squares_1};
  double total = 0;
  for (int k = 0; k < 3; ++k) total += part[k] * squares[k] * inverse[k] * inverse[k];
  return total;
}

// Second sweep, planes: out = sign (full d + the cell's term). line: one row.
template <int64_t kWidth, class S, class A = Wide<S>>
KDFAST_INLINE void plane_gradient(const Pair<S>& x, const Hcl& h, const A* terms, A full, A sign, S* out, A* line) {
  const Columns<kWidth> columns{h.columns};
  const int64_t channels = x.a.channels, width = columns.width();
  A registers[kWidth + 1];
  if (kWidth > 0) line = registers;
  full *= sign;
  for (int64_t c = 0; c < channels; ++c) {
    const S *a = x.a.data + c * x.a.channel_stride, *b = x.b.data + c * x.b.channel_stride;
    S* to = out + c * x.a.channel_stride;
    for (int64_t row = 0; row < h.rows.count; ++row) {
      for (int64_t column = 0; column < columns.count(); ++column) {
        const A term = sign * terms[(row * columns.count() + column) * channels + c];
        for (int64_t i = columns.begin(column); i < columns.begin(column + 1); ++i) line[i] = term;
      }
      for (int64_t y = h.rows.begin[row]; y < h.rows.begin[row + 1]; ++y, a += width, b += width, to += width) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) narrow(full * (widen(a[i]) - widen(b[i])) + line[i], to + i);
      }
    }
  }
}

// The same, interleaved.
template <class S, class A = Wide<S>>
KDFAST_INLINE void interleaved_gradient(const Pair<S>& x, const Hcl& h, const A* terms, A full, A sign, S* out) {
  const int64_t channels = x.a.channels, stride = x.a.position_stride;
  const S *a = x.a.data, *b = x.b.data;
  for (int64_t row = 0; row < h.rows.count; ++row) {
    for (int64_t y = h.rows.begin[row]; y < h.rows.begin[row + 1]; ++y) {
      for (int64_t column = 0; column < h.columns.count; ++column) {
        const A* const term = terms + (row * h.columns.count + column) * channels;
        for (int64_t i = h.columns.begin[column]; i < h.columns.begin[column + 1]; ++i, a += stride, b += stride, out += stride) {
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) narrow(sign * (full * (widen(a[c]) - widen(b[c])) + term[c]), out + c);
        }
      }
    }
  }
}

// How many numbers of scratch `hcl` takes.
inline int64_t hcl_scratch(const Hcl& h, int64_t channels) {
  return 2 * h.rows.count * h.columns.count * channels + std::max(2 * h.columns.begin[h.columns.count], channels);
}

// part: for d^2 in full, then for each level; returns sum part d^2 + sum part_k m^2. Planes of halves come widened.
template <int64_t kWidth, class S, class A = Wide<S>>
KDFAST_INLINE double hcl(const Pair<S>& x, const Hcl& h, const double* part, double factor, A* scratch) {
  constexpr bool kPlanes = std::is_same_v<S, A>;
  const bool interleaved = !kPlanes || x.a.interleaved();
  const int64_t cells_size = h.rows.count * h.columns.count * x.a.channels;
  A *const cells = scratch, *const terms = cells + cells_size, *const line = terms + cells_size;
  double total = 0;
  if constexpr (kPlanes) {
    if (!interleaved) total = part[0] * plane_sums<kWidth>(x, h, cells, line);
  }
  if (interleaved) total = part[0] * interleaved_sums(x, h, cells, line);
  total += h.rows.count == 4 && h.columns.count == 4 ? quarter_windows(h, part + 1, factor, x.a.channels, cells, terms)
                                                     : windows(h, part + 1, factor, x.a.channels, cells, terms, line);
  const A full = static_cast<A>(2 * factor * part[0]);
  for (const bool second : {false, true}) {
    S* const out = second ? x.db : x.da;
    if (out == nullptr) continue;
    const A sign = second ? A(-1) : A(1);
    if constexpr (kPlanes) {
      if (!interleaved) plane_gradient<kWidth>(x, h, terms, full, sign, out, line);
    }
    if (interleaved) interleaved_gradient(x, h, terms, full, sign, out);
  }
  return total;
}

// attention. energy += sum over the tile's channels of x^2 [positions]; partial: [positions] of scratch.
template <class S, class A = Wide<S>>
KDFAST_INLINE void add_energy(const Tile<const S>& x, double* energy, A* partial) {
  constexpr int64_t kFlush = 16;  // planes summed in the type of the arithmetic before they join the fp64 map
  if (x.position_stride == 1) {
    for (int64_t begin = 0; begin < x.channels; begin += kFlush) {
      std::fill_n(partial, x.positions, A(0));
      for (int64_t c = begin; c < std::min(begin + kFlush, x.channels); ++c) {
        const S* plane = x.data + c * x.channel_stride;
#pragma omp simd
        for (int64_t p = 0; p < x.positions; ++p) partial[p] += widen(plane[p]) * widen(plane[p]);
      }
#pragma omp simd
      for (int64_t p = 0; p < x.positions; ++p) energy[p] += partial[p];
    }
    return;
  }
  for (int64_t p = 0; p < x.positions; ++p) {
    const S* at = x.data + p * x.position_stride;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < x.channels; ++c) sum += widen(at[c]) * widen(at[c]);
    energy[p] += sum;
  }
}

// Divides by the norm, or makes it 0 where that is 0; returns 1 / norm, or 0.
KDFAST_INLINE double normalise(double* energy, int64_t positions) {
  double square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t p = 0; p < positions; ++p) square += energy[p] * energy[p];
  const double inverse = square > 0 || square != square ? 1 / std::sqrt(square) : 0.0;
#pragma omp simd
  for (int64_t p = 0; p < positions; ++p) energy[p] *= inverse;
  return inverse;
}

// Of the normalised maps u, v: the factor of x in the gradient, 2 * factor * 2 (e - u <u, e>) / |A|, e = u - v.
template <class A>
KDFAST_INLINE void energy_gradient(const double* u, const double* v, double inverse, double factor, A* out, int64_t positions) {
  double inner = 0;
#pragma omp simd reduction(+ : inner)
  for (int64_t p = 0; p < positions; ++p) inner += u[p] * (u[p] - v[p]);
#pragma omp simd
  for (int64_t p = 0; p < positions; ++p) out[p] = static_cast<A>(4 * factor * inverse * (u[p] - v[p] - u[p] * inner));
}

// out = factor[position] * x; out may be x.
template <class S, class A = Wide<S>>
KDFAST_INLINE void scale(const Tile<const S>& x, const A* factor, S* out) {
  if (x.position_stride == 1) {
    for (int64_t c = 0; c < x.channels; ++c) {
      const S* plane = x.data + c * x.channel_stride;
      S* to = out + c * x.channel_stride;
#pragma omp simd
      for (int64_t p = 0; p < x.positions; ++p) narrow(factor[p] * widen(plane[p]), to + p);
    }
    return;
  }
  for (int64_t p = 0; p < x.positions; ++p) {
    const S* at = x.data + p * x.position_stride;
    S* to = out + p * x.position_stride;
#pragma omp simd
    for (int64_t c = 0; c < x.channels; ++c) narrow(factor[p] * widen(at[c]), to + c);
  }
}

}  // namespace kdfast::cpu
