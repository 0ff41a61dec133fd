// How feature maps lie in memory, and how they are brought to one size. See pathways.cpp for the formulas.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace kdfast::cpu {

// One tensor [batch, channels, height, width]: planes of positions one after another, or channels_last, interleaved.
struct Map {
  void* data;
  int64_t channels, height, width;
  bool interleaved;

  int64_t positions() const { return height * width; }
  int64_t channel_stride() const { return interleaved ? 1 : positions(); }
  int64_t position_stride() const { return interleaved ? channels : 1; }
  template <class T>
  T* at(int64_t sample, int64_t channel) const {
    return static_cast<T*>(data) + sample * channels * positions() + channel * channel_stride();
  }
};

// Some channels of one sample: where they begin and how far apart they lie.
template <class S>
struct Tile {
  S* data;
  int64_t channels, positions, channel_stride, position_stride;

  Tile(S* data, int64_t channels, int64_t positions, bool interleaved)  // packed
      : data(data), channels(channels), positions(positions), channel_stride(interleaved ? 1 : positions),
        position_stride(interleaved ? channels : 1) {}
  Tile(const Map& map, int64_t sample, int64_t channel, int64_t channels)
      : data(map.at<S>(sample, channel)), channels(channels), positions(map.positions()),
        channel_stride(map.channel_stride()), position_stride(map.position_stride()) {}
  bool interleaved() const { return channel_stride == 1 && position_stride != 1; }
};

// Copies between storage and arithmetic type, and between the two orders.
template <class From, class To>
KDFAST_INLINE void convert(const Tile<const From>& from, const Tile<To>& to) {
  const auto one = [](const From& x, To* y) {
    if constexpr (std::is_same_v<From, To>) *y = x;
    else if constexpr (std::is_same_v<To, float>) *y = widen(x);
    else narrow(x, y);
  };
  if (from.position_stride == 1 && to.position_stride == 1) {  // whole planes lie one after another in both
#pragma omp simd
    for (int64_t i = 0; i < from.channels * from.positions; ++i) one(from.data[i], to.data + i);
    return;
  }
  if (from.channel_stride == 1 && to.channel_stride == 1) {
    for (int64_t p = 0; p < from.positions; ++p) {
      const From* source = from.data + p * from.position_stride;
      To* target = to.data + p * to.position_stride;
#pragma omp simd
      for (int64_t c = 0; c < from.channels; ++c) one(source[c], target + c);
    }
    return;
  }
  constexpr int64_t kTurn = 16;  // channels turned together: as many cache lines stay open
  for (int64_t begin = 0; begin < from.channels; begin += kTurn) {
    const int64_t end = std::min(begin + kTurn, from.channels);
    for (int64_t p = 0; p < from.positions; ++p) {
      const From* source = from.data + p * from.position_stride;
      To* target = to.data + p * to.position_stride;
      for (int64_t c = begin; c < end; ++c) one(source[c * from.channel_stride], target + c * to.channel_stride);
    }
  }
}

// Where each position of a resized side comes from: (1 - share) source[low] + share source[high]. As F.interpolate has
// it; the nearest source is found in fp32 for every type.
template <class A>
struct Taps {
  std::vector<int64_t> low, high;  // [out]
  std::vector<A> share;            // [out], 0 for nearest

  Taps(int64_t size, int64_t out, bool bilinear) : low(out), high(out), share(out, A(0)) {
    for (int64_t i = 0; i < out; ++i) {
      if (bilinear) {
        const A ratio = static_cast<A>(size) / static_cast<A>(out);
        const A source = std::max(A(0), ratio * (static_cast<A>(i) + A(0.5)) - A(0.5));
        low[i] = std::min(static_cast<int64_t>(source), size - 1);
        high[i] = std::min(low[i] + 1, size - 1);
        share[i] = source - static_cast<A>(low[i]);
      } else {
        const float ratio = static_cast<float>(size) / static_cast<float>(out);
        low[i] = high[i] = std::min(static_cast<int64_t>(std::floor(static_cast<float>(i) * ratio)), size - 1);
      }
    }
  }
};

template <class A>
struct Resize {
  int64_t height, width;  // of the student's map
  Taps<A> rows, columns;
  bool bilinear;
};

// from [channels, h, w] to [channels, height, width]; line [w].
template <class A>
KDFAST_INLINE void resize_planes(const Resize<A>& r, const A* from, A* to, int64_t channels, A* line) {
  const int64_t height = r.rows.low.size(), width = r.columns.low.size(), w = r.width;
  const int64_t *low = r.columns.low.data(), *high = r.columns.high.data();
  const A* share = r.columns.share.data();
  for (int64_t c = 0; c < channels; ++c) {
    const A* plane = from + c * r.height * w;
    for (int64_t y = 0; y < height; ++y, to += width) {
      const A *top = plane + r.rows.low[y] * w, *bottom = plane + r.rows.high[y] * w;
      if (!r.bilinear) {
        if (y > 0 && r.rows.low[y] == r.rows.low[y - 1]) {
          std::copy_n(to - width, width, to);
        } else {
          for (int64_t x = 0; x < width; ++x) to[x] = top[low[x]];
        }
        continue;
      }
      const A lower = r.rows.share[y], upper = A(1) - lower;
#pragma omp simd
      for (int64_t x = 0; x < w; ++x) line[x] = upper * top[x] + lower * bottom[x];
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) to[x] = (A(1) - share[x]) * line[low[x]] + share[x] * line[high[x]];
    }
  }
}

// Its transpose: grad [channels, height, width] to [channels, h, w]; line [max(w, width)].
template <class A>
KDFAST_INLINE void resize_planes_adjoint(const Resize<A>& r, const A* grad, A* to, int64_t channels, A* line) {
  const int64_t height = r.rows.low.size(), width = r.columns.low.size(), w = r.width;
  const int64_t *low = r.columns.low.data(), *high = r.columns.high.data();
  const A* share = r.columns.share.data();
  std::fill_n(to, channels * r.height * w, A(0));
  for (int64_t c = 0; c < channels; ++c, to += r.height * w) {
    for (int64_t y = 0; y < height;) {
      A *top = to + r.rows.low[y] * w, *bottom = to + r.rows.high[y] * w;
      if (r.bilinear) {
        std::fill_n(line, w, A(0));
        for (int64_t x = 0; x < width; ++x) {
          line[low[x]] += (A(1) - share[x]) * grad[x];
          line[high[x]] += share[x] * grad[x];
        }
        const A lower = r.rows.share[y], upper = A(1) - lower;
        for (int64_t x = 0; x < w; ++x) {
          top[x] += upper * line[x];
          bottom[x] += lower * line[x];  // the same row at the lower border
        }
        ++y, grad += width;
        continue;
      }
      // All rows of one source are added up, then the columns, which come in runs of one source too.
      std::copy_n(grad, width, line);
      const int64_t source = r.rows.low[y];
      for (++y, grad += width; y < height && r.rows.low[y] == source; ++y, grad += width) {
#pragma omp simd
        for (int64_t x = 0; x < width; ++x) line[x] += grad[x];
      }
      for (int64_t x = 0; x < width;) {
        const int64_t column = low[x];
        A sum = 0;
        for (; x < width && low[x] == column; ++x) sum += line[x];
        top[column] = sum;
      }
    }
  }
}

// from [h * w, channels] to [height * width, channels].
template <class A>
KDFAST_INLINE void resize_interleaved(const Resize<A>& r, const A* from, A* to, int64_t channels) {
  const int64_t height = r.rows.low.size(), width = r.columns.low.size();
  for (int64_t y = 0; y < height; ++y) {
    const A *top = from + r.rows.low[y] * r.width * channels, *bottom = from + r.rows.high[y] * r.width * channels;
    const A lower = r.rows.share[y], upper = A(1) - lower;
    for (int64_t x = 0; x < width; ++x, to += channels) {
      const int64_t left = r.columns.low[x] * channels, right = r.columns.high[x] * channels;
      if (!r.bilinear) {
        std::copy_n(top + left, channels, to);
        continue;
      }
      const A share = r.columns.share[x], rest = A(1) - share;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        to[c] = upper * (rest * top[left + c] + share * top[right + c]) + lower * (rest * bottom[left + c] + share * bottom[right + c]);
    }
  }
}

// Its transpose.
template <class A>
KDFAST_INLINE void resize_interleaved_adjoint(const Resize<A>& r, const A* grad, A* to, int64_t channels) {
  const int64_t height = r.rows.low.size(), width = r.columns.low.size();
  std::fill_n(to, channels * r.height * r.width, A(0));
  const auto add = [&](A* target, A factor) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) target[c] += factor * grad[c];
  };
  for (int64_t y = 0; y < height; ++y) {
    A *top = to + r.rows.low[y] * r.width * channels, *bottom = to + r.rows.high[y] * r.width * channels;
    const A lower = r.rows.share[y], upper = A(1) - lower;
    for (int64_t x = 0; x < width; ++x, grad += channels) {
      const int64_t left = r.columns.low[x] * channels, right = r.columns.high[x] * channels;
      const A share = r.columns.share[x], rest = A(1) - share;
      add(top + left, upper * rest);
      if (!r.bilinear) continue;
      add(top + right, upper * share);
      add(bottom + left, lower * rest);
      add(bottom + right, lower * share);
    }
  }
}

}  // namespace kdfast::cpu
