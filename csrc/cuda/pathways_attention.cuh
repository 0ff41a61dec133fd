// attention transfer on the GPU: a block takes one sample of one pair.
//
//   A(x) = sum_c x_c^2,  M = A / |A|    delta = mean over samples and positions of (M(a) - M(b))^2
//   u = 2 (M(a) - M(b)) / (N H W),   d delta / d a_c = 2 a_c (u - M(a) <u, M(a)>) / |A(a)|,   for b with -u
//
// A map of norm zero has M = 0, and gradient 0. A resized student is resized before it is squared.
// Fused: both maps, their norms, the distance and both gradients; the maps [H W] stay in shared memory (beyond its
// size in a scratch tensor).
// Memory for a sample of n elements of b bytes: forward reads 2 n b. Backward reads 2 n b for the maps, as the
// gradient wants all of them, then reads n b again and writes n b: 6 passes, the second reading of a from l2 where
// the samples in flight fit there.
// Source: Zagoruyko, Komodakis 2017 (arXiv:1612.03928).
#pragma once

#include "pathways.cuh"

namespace kdfast::cuda::pathways {

template <class T, class A>
__device__ __forceinline__ void add_squares(const T* from, A (&sums)[kChunk<T>]) {
  const Vector<T> v = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) sums[i] += static_cast<A>(v.x[i]) * static_cast<A>(v.x[i]);
}
template <class T, class A>
__device__ __forceinline__ void add_squares(const T* from, A (&sums)[1]) {
  sums[0] += static_cast<A>(*from) * static_cast<A>(*from);
}

// map[position] = sum over channels of the squares, positions N neighbours at a time: the threads left over when
// there are fewer than that share the channels.
template <int N, class T, class A>
__device__ void square_planes(const T* x, int channels, int positions, A* map, A* shared) {
  const int across = positions / N, groups = most(kThreads / across, 1), thread = threadIdx.x;
  for (int at = thread % least(across, kThreads); at < across; at += kThreads) {
    const int group = groups > 1 ? thread / across : 0;
    A sums[N] = {};
    if (group < groups) {
#pragma unroll 4
      for (int c = group; c < channels; c += groups) add_squares(x + c * positions + at * N, sums);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (groups == 1) map[at * N + i] = sums[i];
      else if (group < groups) shared[group * positions + at * N + i] = sums[i];
    }
  }
  if (groups == 1) return;
  __syncthreads();
  for (int position = thread; position < positions; position += kThreads) {
    A sum = 0;
    for (int group = 0; group < groups; ++group) sum += shared[group * positions + position];
    map[position] = sum;
  }
  __syncthreads();
}

// The same with the channels innermost: 1 to 32 lanes share a position.
template <int N, class T, class A>
__device__ void square_pixels(const T* x, int channels, int positions, A* map) {
  const int across = channels / N;
  int lanes = 1;
  while (lanes < kWarp && lanes < across) lanes *= 2;
  const int step = kThreads / lanes, lane = threadIdx.x & (lanes - 1);
  for (int begin = 0; begin < positions; begin += step) {
    const int position = begin + static_cast<int>(threadIdx.x) / lanes;
    A sums[N] = {}, sum = 0;
    if (position < positions) {
#pragma unroll 4
      for (int at = lane; at < across; at += lanes) add_squares(x + position * channels + at * N, sums);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sum += sums[i];
    sum = sum_over(sum, lanes);
    if (lane == 0 && position < positions) map[position] = sum;
  }
}

template <class T, class A>
__device__ void square(const T* x, int channels, int positions, bool last, bool vectors, A* map, A* shared) {
  constexpr int N = kChunk<T>;
  if (last) {
    if (vectors && channels % N == 0) square_pixels<N>(x, channels, positions, map);
    else square_pixels<1>(x, channels, positions, map);
  } else if (vectors && positions % N == 0) {
    square_planes<N>(x, channels, positions, map, shared);
  } else {
    square_planes<1>(x, channels, positions, map, shared);
  }
}

// out = x map, the map's value that of the element's position.
template <int N, class T, class A>
__device__ void scale(const T* x, T* out, const A* map, int channels, int positions, bool last) {
  const int inner = (last ? channels : positions) / N, all = channels * positions / N;
  Counter at(threadIdx.x, kThreads, inner, last ? positions : channels);
  constexpr int kLoad = N == 1 ? 1 : kChunk<T>;
#pragma unroll 4
  for (int i = threadIdx.x; i < all; i += kThreads, at.next()) {
    const A* here = map + (last ? at.digit[1] : at.digit[0] * N);
    if constexpr (kLoad == 1) {
      out[i] = static_cast<T>(static_cast<A>(x[i]) * *here);
    } else {
      Vector<T> v = reinterpret_cast<const Vector<T>*>(x)[i];
#pragma unroll
      for (int k = 0; k < N; ++k) v.x[k] = static_cast<T>(static_cast<A>(v.x[k]) * (last ? *here : here[k]));
      store(out + i * N, Chunks<N>(0, N, true), 0, v);
    }
  }
}

template <class T, class A>
__device__ void scale(const T* x, T* out, const A* map, int channels, int positions, bool last, bool vectors) {
  constexpr int N = kChunk<T>;
  if (vectors && (last ? channels : positions) % N == 0) scale<N>(x, out, map, channels, positions, last);
  else scale<1>(x, out, map, channels, positions, last);
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, kBlocks<A, true>) attention(const __grid_constant__ Call<T, A> call) {
  const Task<T, A> task(call);
  const Pair& pair = task.pair;
  if (!task.kept && !task.wants_gradient()) return;
  const int positions = pair.height * pair.width;
  A* shared = dynamic_memory<A>();
  A* of_student = call.scratch == nullptr ? shared + kThreads * kChunk<T>
                                          : call.scratch + static_cast<int64_t>(blockIdx.x) * 2 * pair.stage;
  A* of_teacher = of_student + pair.stage;
  const Student<T, A> student = student_of(call, pair, task.tile, 0);
  const int64_t student_at = student.data - static_cast<const T*>(pair.student);
  const int64_t teacher_at = static_cast<int64_t>(task.tile) * pair.teacher_channels * positions;
  const T* teacher = static_cast<const T*>(pair.teacher) + teacher_at;

  A value = 0, inverse[2] = {}, dot[2] = {};
  const A unit = A(1) / (A(pair.samples) * A(positions)), factor = A(2) * unit * task.coefficient;
  if (task.kept) {
    if (student.same) {
      square(student.data, pair.channels, positions, pair.student_last, pair.vectors, of_student, shared);
    } else {
      for (int i = threadIdx.x; i < positions; i += kThreads) {
        const int y = i / pair.width, x = i - y * pair.width;
        A sum = 0;
        for (int c = 0; c < pair.channels; ++c) {
          const A here = student.at(c, y, x);
          sum += here * here;
        }
        of_student[i] = sum;
      }
    }
    square(teacher, pair.teacher_channels, positions, pair.teacher_last, pair.vectors, of_teacher, shared);
    __syncthreads();
    A norms[2] = {};
    for (int i = threadIdx.x; i < positions; i += kThreads) {
      norms[0] += of_student[i] * of_student[i], norms[1] += of_teacher[i] * of_teacher[i];
    }
    block_sum(norms);
#pragma unroll
    for (int k = 0; k < 2; ++k) inverse[k] = norms[k] == A(0) ? A(0) : A(1) / sqrt(norms[k]);
    A sums[3] = {};
    for (int i = threadIdx.x; i < positions; i += kThreads) {
      const A m = of_student[i] * inverse[0], n = of_teacher[i] * inverse[1], d = m - n;
      sums[0] += d * d, sums[1] += d * m, sums[2] += d * n;
    }
    block_sum(sums);
    value = sums[0] * unit;
#pragma unroll
    for (int k = 0; k < 2; ++k) dot[k] = sums[k + 1];
  }
  if (call.partials != nullptr && task.kept && threadIdx.x == 0) call.partials[blockIdx.x] = value;
  if (!task.wants_gradient()) return;

  for (int i = threadIdx.x; i < positions; i += kThreads) {  // a thread reads and writes its own positions
    A m = 0, n = 0;
    if (task.kept) {
      m = of_student[i] * inverse[0], n = of_teacher[i] * inverse[1];
      const A d = m - n;
      const A by_m = A(2) * factor * inverse[0] * (d - m * dot[0]);
      n = A(2) * factor * inverse[1] * (n * dot[1] - d), m = by_m;
    }
    of_student[i] = m, of_teacher[i] = n;
  }
  __syncthreads();
  if (pair.teacher_grad != nullptr) {
    T* out = static_cast<T*>(pair.teacher_grad) + teacher_at;
    if (task.kept) scale(teacher, out, of_teacher, pair.teacher_channels, positions, pair.teacher_last, pair.vectors);
    else for (int i = threadIdx.x; i < pair.teacher_channels * positions; i += kThreads) out[i] = static_cast<T>(0);
  }
  if (pair.student_grad == nullptr) return;
  T* out = static_cast<T*>(pair.student_grad) + student_at;
  if (!task.kept) {
    const int all = pair.channels * pair.in_height * pair.in_width;
    for (int i = threadIdx.x; i < all; i += kThreads) out[i] = static_cast<T>(0);
  } else if (student.same) {
    scale(student.data, out, of_student, pair.channels, positions, pair.student_last, pair.vectors);
  } else {
    student.layout.each(pair.channels, [&](Place p) {
      const A g = student.gather(p.y, p.x, [&](int y, int x) {
        return student.at(p.channel, y, x) * of_student[y * pair.width + x];
      });
      out[student.layout.at(p.channel, p.y, p.x)] = static_cast<T>(g);
    });
  }
}

}  // namespace kdfast::cuda::pathways
