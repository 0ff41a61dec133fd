// Launchers of kd_kl's kernels for one divergence. How a row is shared is decided here.
#pragma once

#include <algorithm>

#include "kd_kl_fused.cuh"

namespace kdfast::cuda {

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }  // null is

inline int power_of_two_from(int x) {
  int p = 1;
  while (p < x) p *= 2;
  return p;
}

constexpr int chunks_of(int classes, int a_chunk) {  // at most, wherever the row begins
  return classes / a_chunk + (classes % a_chunk == 0 ? 0 : 2);
}

template <class F, bool kFused>
int wide_threads(int chunks) {
  return std::clamp(power_of_two_from(chunks / 8), kNarrowThreads, kWideThreads<F, kFused>);
}

template <class T>
Column<T> column(const Request::Column& x) {
  return {static_cast<const T*>(x.data), x.stride};
}

template <class T, class A>
Call<T, A> make_call(const Request& r) {
  Call<T, A> call{};
  call.student = static_cast<const T*>(r.student), call.teacher = static_cast<const T*>(r.teacher);
  call.student_temperature = column<A>(r.student_temperature);
  call.teacher_temperature = column<A>(r.teacher_temperature);
  call.labels = column<int64_t>(r.labels);
  call.target = static_cast<const A*>(r.target);
  call.weight = column<A>(r.weight), call.grad = column<A>(r.grad);
  call.coefficient = static_cast<A>(r.coefficient);
  call.loss = static_cast<A*>(r.loss), call.stats = static_cast<A*>(r.stats);
  call.parts = static_cast<A*>(r.parts);
  call.student_grad = static_cast<T*>(r.student_grad), call.teacher_grad = static_cast<T*>(r.teacher_grad);
  call.options = make_options<A>(r.tau_s, r.tau_t, r.alpha, r.label_smoothing, r.ignore_index, r.divergence,
                                 r.scale, r.beta, r.target_weight, r.softcap, r.logit_scale);
  call.rows = r.rows, call.classes = r.classes;
  call.temperature_grad = r.temperature_grad;
  call.aligned = is_aligned(r.student) && is_aligned(r.teacher) && is_aligned(r.target) &&
                 is_aligned(r.student_grad) && is_aligned(r.teacher_grad);
  return call;
}

template <class F>
using CallOf = Call<typename F::T, typename F::A>;

// Lanes for a row of so many chunks, and blocks for all rows.
template <class T, class A>
unsigned share_warps(Call<T, A>& call, int chunks) {
  call.lanes = std::min(kWarp, power_of_two_from(chunks));
  const int rows_a_block = kNarrowThreads / call.lanes;
  return static_cast<unsigned>((call.rows + rows_a_block - 1) / rows_a_block);
}

template <class C>
cudaError_t launch(void (*kernel)(C), dim3 blocks, int threads, cudaStream_t stream, const C& call, int64_t bytes = 0,
                   int cluster = 1) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = cluster > 1;
  if (cluster > 1) {
    int fitting = 0;  // clusters of this size that a GPU, or the slice of one we have, can hold
    if (cudaOccupancyMaxActiveClusters(&fitting, kernel, &config) != cudaSuccess || fitting == 0) {
      cudaGetLastError();  // forgotten: the caller has another way
      return cudaErrorNotSupported;
    }
  }
  return cudaLaunchKernelEx(&config, kernel, call);
}

// ---------------------------------------------------------------- forward, backward
// One block a row, or where rows are too few to fill a GPU so many that a thread still has two chunks.
template <class F>
int parts_of_forward(const Request& r) {
  constexpr int64_t kEnough = 512;  // blocks of most threads, more than the largest GPUs hold at a time
  if (r.classes <= kNarrow || r.rows == 0) return 1;
  const int chunks = chunks_of(r.classes, F::N), threads = wide_threads<F, false>(chunks);
  return std::max(1, static_cast<int>(std::min<int64_t>({kEnough / r.rows, chunks / (2 * threads), threads})));
}

template <class F>
cudaError_t launch_forward(const Request& r) {
  CallOf<F> call = make_call<typename F::T, typename F::A>(r);
  const int chunks = chunks_of(r.classes, F::N);
  if (r.classes <= kNarrow) {
    const unsigned blocks = share_warps(call, chunks);
    return launch(forward<F, LaneGroup>, blocks, kNarrowThreads, r.stream, call);
  }
  const unsigned rows = static_cast<unsigned>(r.rows);
  const int threads = wide_threads<F, false>(chunks);
  const int parts = parts_of_forward<F>(r);
  void (*const kernel)(CallOf<F>) = forward<F, BlockGroup>;
  if (parts == 1) return launch(kernel, rows, threads, r.stream, call);
  call.lanes = parts;
  const dim3 shared(rows, parts);
  call.stage = kSumUp;
  if (auto e = launch(kernel, shared, threads, r.stream, call)) return e;
  if (call.options.soft && (F::kFamily == kJsd || call.temperature_grad)) {
    call.stage = kLookAgain;
    if (auto e = launch(kernel, shared, threads, r.stream, call)) return e;
  }
  call.stage = kConclude;
  return launch(kernel, rows, (parts + kWarp - 1) / kWarp * kWarp, r.stream, call);
}

template <class F>
cudaError_t launch_backward(const Request& r) {
  CallOf<F> call = make_call<typename F::T, typename F::A>(r);
  const int chunks = chunks_of(r.classes, F::N);
  if (r.classes <= kNarrow) {
    const unsigned blocks = share_warps(call, chunks);
    return launch(backward<F, LaneGroup>, blocks, kNarrowThreads, r.stream, call);
  }
  const int threads = wide_threads<F, false>(chunks);
  const bool sums_first = call.options.hard && (F::kFamily == kJsd || call.target != nullptr ||
                                                call.options.smoothing > 0);
  constexpr int64_t kEnough = 1024;  // blocks that fill the largest GPUs
  const int64_t parts = sums_first ? 1 : std::min<int64_t>(kEnough / r.rows, chunks / threads);
  const dim3 blocks(static_cast<unsigned>(r.rows), static_cast<unsigned>(std::max<int64_t>(1, parts)));
  return launch(backward<F, BlockGroup>, blocks, threads, r.stream, call);
}

// ---------------------------------------------------------------- value_and_grad
struct Limits {
  int shared, clusters;  // bytes of shared memory a block may ask for; whether blocks form clusters
};
constexpr int kOfReductions = 6 * 1024;  // bytes; what the kernels declare themselves is less
inline cudaError_t limits_of(int device, Limits& out) {
  if (auto e = cudaDeviceGetAttribute(&out.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return e;
  out.shared -= kOfReductions;
  return cudaDeviceGetAttribute(&out.clusters, cudaDevAttrClusterLaunch, device);
}

inline int64_t slots_bytes(int chunks, int sharers, int threads) {
  const int64_t turns = (chunks + sharers - 1) / sharers;
  return turns * threads * 2 * static_cast<int64_t>(sizeof(uint4));
}

// Leave for a kernel to have more shared memory than every one has, its own included: for all that there is, so that it
// does not matter which thread of the host asked last.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int64_t bytes, const Limits& limits) {
  if (bytes + kOfReductions <= 48 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared);
}

template <class F, class Group>
cudaError_t launch_fused(const CallOf<F>& call, unsigned blocks, int threads, int64_t bytes, const Limits& limits,
                         cudaStream_t stream, int cluster = 1) {
  void (*const kernel)(CallOf<F>) = value_and_grad<F, Group>;
  if (auto e = allow_shared(kernel, bytes, limits)) return e;
  if (cluster > 8) {
    if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) return e;
  }
  return launch(kernel, blocks, threads, stream, call, bytes, cluster);
}

template <class F>
cudaError_t launch_value_and_grad(const Request& r) {
  CallOf<F> call = make_call<typename F::T, typename F::A>(r);
  const int chunks = chunks_of(r.classes, F::N);
  Limits limits;
  if (auto e = limits_of(r.device, limits)) return e;
  if (r.classes <= kNarrow) {
    const unsigned blocks = share_warps(call, chunks);
    const int64_t bytes = slots_bytes(chunks, call.lanes, kNarrowThreads);  // 36 KB at most
    return launch_fused<F, LaneGroup>(call, blocks, kNarrowThreads, bytes, limits, r.stream);
  }
  // The fewest blocks a row that leave room for a second block on the multiprocessor, to read while one
  // waits for its sums; else the fewest that fit. Clusters of 16 not every GPU has.
  for (const int room : {limits.shared / 2, limits.shared}) {
    for (int cluster = 1; cluster <= (limits.clusters ? 16 : 1); cluster *= 2) {
      const int threads = wide_threads<F, true>(chunks / cluster);
      const int64_t bytes = slots_bytes(chunks, threads * cluster, threads);
      if (bytes > room || r.rows * cluster > INT32_MAX) continue;
      const unsigned blocks = static_cast<unsigned>(r.rows * cluster);
      if (cluster == 1) return launch_fused<F, BlockGroup>(call, blocks, threads, bytes, limits, r.stream);
      const cudaError_t e = launch_fused<F, ClusterGroup>(call, blocks, threads, bytes, limits, r.stream, cluster);
      if (e != cudaErrorNotSupported) return e;
    }
  }
  return cudaErrorNotSupported;
}

// ---------------------------------------------------------------- by storage type
template <Family kFamily, bool kMapped, class Use>
auto with_form(Storage storage, const Use& use) {
  switch (storage) {
    case kFloat: return use(Form<float, float, kFamily, kMapped>{});
    case kDouble: return use(Form<double, double, kFamily, kMapped>{});
    case kBFloat16: return use(Form<__nv_bfloat16, float, kFamily, kMapped>{});
    default: return use(Form<__half, float, kFamily, kMapped>{});
  }
}

template <Family kFamily, bool kMapped>
int Launch<kFamily, kMapped>::forward_parts(const Request& r) {
  return with_form<kFamily, kMapped>(r.storage, [&](auto form) { return parts_of_forward<decltype(form)>(r); });
}
template <Family kFamily, bool kMapped>
cudaError_t Launch<kFamily, kMapped>::forward(const Request& r) {
  return with_form<kFamily, kMapped>(r.storage, [&](auto form) { return launch_forward<decltype(form)>(r); });
}
template <Family kFamily, bool kMapped>
cudaError_t Launch<kFamily, kMapped>::backward(const Request& r) {
  return with_form<kFamily, kMapped>(r.storage, [&](auto form) { return launch_backward<decltype(form)>(r); });
}
template <Family kFamily, bool kMapped>
cudaError_t Launch<kFamily, kMapped>::value_and_grad(const Request& r) {
  return with_form<kFamily, kMapped>(r.storage, [&](auto form) {
    using F = decltype(form);
    if constexpr (std::is_same_v<typename F::A, double>) return cudaErrorNotSupported;  // too slow to matter
    else return launch_value_and_grad<F>(r);
  });
}

}  // namespace kdfast::cuda
