// augment_images on the CPU: a batch out of a set of images in memory, cropped, mirrored, normalised and cut out.
//
//   out[b, c, y, x] = scale_c p + offset_c,   0 within the square of b
//   p = images[sample_b, c, y + top_b - shift, x' + left_b - shift], 0 outside;   x' = x, mirrored width - 1 - x
//
// Fused: all of it, one sweep. Memory: 5 bytes a pixel: uint8 read, fp32 written. Compiled without fused products, so
// that it gives the same bits as the definition in kdfast/data/resident.py.
#include <algorithm>

#include "../stable.h"
#include "vec.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kRun = 32;         // pixels converted at a time
constexpr int64_t kFetched = 8192;   // pixels of the next image: the rest follows by itself
constexpr int64_t kShare = 1 << 20;  // pixels that are worth waking a thread for

// One channel of one image.
template <class T>
struct Plane {
  const T* pixels;        // [height, width]
  int64_t before, after;  // pixels of the set that lie before and after it
  int64_t height, width;
  int64_t down, right;  // where the cut begins, from -shift to shift
  bool mirrored;
  float scale, offset;
  const int64_t* square;  // top, left, bottom, right of what is zeroed; or null
  float* out;  // [height, width]
};

// out[x] = scale row[x] + offset, mirrored of row[n - 1 - x]; in pieces, as loops of a fixed length cost less.
template <bool Mirrored, class T>
KDFAST_INLINE void convert(const T* row, int64_t n, float scale, float offset, float* out) {
  int64_t x = 0;
  for (; x + kRun <= n; x += kRun) {
    const T* from = Mirrored ? row + n - kRun - x : row + x;
#pragma omp simd
    for (int64_t j = 0; j < kRun; ++j) {
      out[x + j] = static_cast<float>(from[Mirrored ? kRun - 1 - j : j]) * scale + offset;
    }
  }
  for (; x < n; ++x) out[x] = static_cast<float>(row[Mirrored ? n - 1 - x : x]) * scale + offset;
}

template <bool Mirrored, class T>
KDFAST_INLINE void plane_of(const Plane<T>& p) {
  const int64_t width = p.width;
  const float scale = p.scale, offset = p.offset, outside = 0.0f * scale + offset;
  // Columns [first, last) of the cut lie within the image; `low` are outside on the result's left.
  const int64_t first = std::clamp<int64_t>(-p.right, 0, width), last = std::clamp<int64_t>(width - p.right, 0, width);
  const int64_t low = Mirrored ? width - last : first, high = Mirrored ? width - first : last;
  for (int64_t y = 0; y < p.height; ++y) {
    float* out = p.out + y * width;
    const int64_t from = y + p.down;
    if (from < 0 || from >= p.height) {
      std::fill_n(out, width, outside);
    } else {
      // The whole width is read, over the end of the row or from before its beginning, and what lies outside filled
      // afterwards: rows of whole vectors stay such. Only the set must not be left.
      const int64_t begin = from * width + p.right;
      if (begin >= -p.before && begin + width <= p.height * width + p.after) {
        convert<Mirrored>(p.pixels + begin, width, scale, offset, out);
      } else {
        convert<Mirrored>(p.pixels + begin + first, last - first, scale, offset, out + low);
      }
      for (int64_t x = 0; x < low; ++x) out[x] = outside;
      for (int64_t x = high; x < width; ++x) out[x] = outside;
    }
    if (p.square != nullptr && y >= p.square[0] && y < p.square[2]) {
      std::fill(out + p.square[1], out + p.square[3], 0.0f);
    }
  }
}

// Compiled once for each kind of vector unit.
KDFAST_CLONES void fill(const Plane<uint8_t>& p) { p.mirrored ? plane_of<true>(p) : plane_of<false>(p); }
KDFAST_CLONES void fill(const Plane<float>& p) { p.mirrored ? plane_of<true>(p) : plane_of<false>(p); }

Tensor augment_images(Tensor images, Tensor samples, Tensor corners, Tensor flips, int64_t shift, Tensor scale,
                      Tensor offset, OptionalTensor squares) {
  const int64_t count = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t batch = samples.numel(), pixels = height * width, size = channels * pixels;
  STD_TORCH_CHECK(images.is_contiguous() && samples.is_contiguous() && corners.is_contiguous() &&
                      flips.is_contiguous() && (!squares.has_value() || squares->is_contiguous()),
                  "augment_images: tensors must be contiguous");
  STD_TORCH_CHECK(corners.numel() == 2 * batch && flips.numel() == batch && scale.numel() == channels &&
                      offset.numel() == channels && (!squares.has_value() || squares->numel() == 4 * batch),
                  "augment_images: a corner, a flip and a square an image, a scale and an offset a channel");
  const auto* sample = static_cast<const int64_t*>(samples.data_ptr());
  const auto* corner = static_cast<const int64_t*>(corners.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(sample[b] >= 0 && sample[b] < count, "augment_images: an image of another set");
  }
  const auto* flip = static_cast<const bool*>(flips.data_ptr());
  const auto* square = data_or_null<int64_t>(squares);
  const auto* scales = static_cast<const float*>(scale.data_ptr());
  const auto* offsets = static_cast<const float*>(offset.data_ptr());
  Tensor out = empty(images, {batch, channels, height, width}, ScalarType::Float);
  const auto run = [&]<class T>(const T* set) {
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (b + 1 < end) {  // from anywhere in a set that is larger than any cache: fetched while this one is made
          const T* next = set + sample[b + 1] * size;
          for (int64_t at = 0; at < std::min(size, kFetched); at += 64 / sizeof(T)) __builtin_prefetch(next + at);
        }
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t before = (sample[b] * channels + c) * pixels;
          fill(Plane<T>{set + before, before, images.numel() - before - pixels, height, width, corner[2 * b] - shift,
                        corner[2 * b + 1] - shift, flip[b], scales[c], offsets[c],
                        square == nullptr ? nullptr : square + 4 * b,
                        static_cast<float*>(out.data_ptr()) + (b * channels + c) * pixels});
        }
      }
    };
    const int64_t grain = std::max<int64_t>(1, kShare / std::max<int64_t>(1, size));
    batch <= grain ? some(0, batch) : torch::stable::parallel_for(0, batch, grain, some);
  };
  if (images.scalar_type() == ScalarType::Byte) {
    run(static_cast<const uint8_t*>(images.data_ptr()));
  } else {
    STD_TORCH_CHECK(images.scalar_type() == ScalarType::Float, "augment_images: images must be uint8 or fp32");
    run(static_cast<const float*>(images.data_ptr()));
  }
  return out;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("augment_images", TORCH_BOX(&kdfast::cpu::augment_images)); }
