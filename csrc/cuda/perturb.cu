// perturb on the GPU: all parameters displaced along w = factor v, by a size relative to their own.
//
//   epsilon = radius / sqrt( sum_l (|w_l| / d_l)^2 ),   d_l = max(|theta_l|, 1e-3 sqrt(n)) | sqrt(n) for vectors
//   ahead = theta + epsilon w,  behind = theta - epsilon w,  slope = sum_l <g_l, w_l>
//
// Two launches for up to kTensors tensors (and two more for each further table of them), and nothing waited for:
//   sums    a block for each piece of a tensor: <w, w>, <theta, theta>, <g, w> of the piece, in a fixed order
//   points  every block adds up all pieces' sums, tensor by tensor, each in the same order and so to the same bits: a few
//           KB from cache, cheaper than a third launch. Then it writes its piece of both points.
// Memory: 5 passes over the parameters read (theta, g, v; theta, v), one or two written: 24 bytes an element in fp32, 28
// for both points. Sums: fp32 in a thread (64 elements), fp64 from the block on.
// docs/math/perturb.md.
#include <algorithm>

#include "tensors.cuh"

namespace kdfast::cuda::perturb {
namespace {

constexpr double kSmallestRms = 1e-3;  // SMALLEST_RMS in kdfast/reference/perturb.py
constexpr int kWarps = kSweepThreads / kWarp;

struct Sums {
  double ww = 0, tt = 0, gw = 0;  // <w, w>, <theta, theta>, <g, w>

  __device__ void reduce() {
    ww = sum_over(ww, kWarp), tt = sum_over(tt, kWarp), gw = sum_over(gw, kWarp);
  }
};

// What the second kernel has to know of a tensor, whichever table it stands in.
struct About {
  int64_t first_piece, pieces, numel;  // of the whole network's pieces
  int64_t is_weight;
};

template <class T>
struct SumsCall {
  Table<3> table;            // theta, g, v
  double factor[kTensors];
  bool is_weight[kTensors];  // 2 dimensions and more
  Sums* partial;             // [pieces of the network]
  About* about;              // [tensors of the network]
  int64_t pieces_before, tensors_before;  // in the tables before this one
};

template <class T, class A>
__global__ void __launch_bounds__(kSweepThreads, 2) sums(const __grid_constant__ SumsCall<T> call) {
  const Place place = place_of(call.table, blockIdx.x);
  const int l = place.tensor;
  const T* in[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) in[k] = static_cast<const T*>(call.table.pointers[k][l]) + place.begin;
  const A factor = static_cast<A>(call.factor[l]);
  A ww = 0, tt = 0, gw = 0;
  T* const nowhere[1] = {nullptr};
  sweep<T, A>(in, nowhere, place.count, [&](const A(&x)[3], A(&y)[1]) {
    const A w = factor * x[2];
    ww += w * w, tt += x[0] * x[0], gw += x[1] * w;
    y[0] = A(0);
  });
  Sums sum{static_cast<double>(ww), static_cast<double>(tt), static_cast<double>(gw)};
  sum.reduce();
  __shared__ Sums of_warp[kWarps];
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarps; ++i) {
    sum.ww += of_warp[i].ww, sum.tt += of_warp[i].tt, sum.gw += of_warp[i].gw;
  }
  call.partial[call.pieces_before + blockIdx.x] = sum;
  if (place.begin == 0) {
    const int first = call.table.first_piece[l], next = call.table.first_piece[l + 1];
    call.about[call.tensors_before + l] = {call.pieces_before + first, next - first, call.table.numel[l],
                                           call.is_weight[l]};
  }
}

template <class T, class A>
struct PointsCall {
  Table<4> table;  // theta, v; ahead, behind (or null)
  double factor[kTensors];
  const Sums* partial;
  const About* about;
  int64_t tensors;  // of the network
  double radius;
  A* summary;       // [2]: epsilon, slope; null but in the first table
};

// epsilon, the same in every block. A warp takes every kWarps-th tensor, its lanes every kWarp-th piece of it.
template <class T, class A>
__device__ A epsilon_of(const PointsCall<T, A>& call) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double relative = 0, slope = 0;
  for (int64_t l = warp; l < call.tensors; l += kWarps) {
    const About about = call.about[l];
    Sums sum;
    for (int64_t i = lane; i < about.pieces; i += kWarp) {
      const Sums piece = call.partial[about.first_piece + i];
      sum.ww += piece.ww, sum.tt += piece.tt, sum.gw += piece.gw;
    }
    sum.reduce();
    const double n = static_cast<double>(about.numel);
    const double size = about.is_weight ? fmax(sqrt(sum.tt / n), kSmallestRms) : 1.0;
    relative += sum.ww / n / (size * size);
    slope += sum.gw;
  }
  __shared__ double relatives[kWarps], slopes[kWarps];
  __shared__ A epsilon;
  if (lane == 0) relatives[warp] = relative, slopes[warp] = slope;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kWarps; ++i) relative += relatives[i], slope += slopes[i];
    epsilon = static_cast<A>(call.radius / sqrt(relative));
    if (!(relative > 0) || !isfinite(relative) || !isfinite(epsilon)) epsilon = 0;
    if (call.summary != nullptr && blockIdx.x == 0) {
      call.summary[0] = epsilon, call.summary[1] = static_cast<A>(slope);
    }
  }
  __syncthreads();
  return epsilon;
}

template <class T, class A>
__global__ void __launch_bounds__(kSweepThreads, 2) points(const __grid_constant__ PointsCall<T, A> call) {
  const Place place = place_of(call.table, blockIdx.x);
  const auto pointer = [&](int k) {
    T* const data = static_cast<T*>(call.table.pointers[k][place.tensor]);
    return data == nullptr ? data : data + place.begin;
  };
  const T* const in[2] = {pointer(0), pointer(1)};
  T* const out[2] = {pointer(2), pointer(3)};
  const A epsilon = epsilon_of(call);
  const A step = epsilon * static_cast<A>(call.factor[place.tensor]);
  sweep<T, A>(in, out, place.count, [&](const A(&x)[2], A(&y)[2]) {
    const A move = epsilon == A(0) ? A(0) : step * x[1];  // v may be what is not finite
    y[0] = x[0] + move, y[1] = x[0] - move;
  });
}

using Tensors = std::vector<Tensor>;

template <class T, class A>
void run(const Tensors& theta, const Tensors& g, const Tensors& v, const std::vector<double>& factors, double radius,
         const Tensors& ahead, const Tensors& behind, const Tensor& summary, cudaStream_t stream) {
  int64_t pieces = 0, tensors = 0;
  for (const Tensor& t : theta) pieces += pieces_of(t.numel()), tensors += t.numel() > 0;
  A* const out = static_cast<A*>(summary.data_ptr());
  if (tensors == 0) {  // no launch finds out that w is nothing
    STD_CUDA_CHECK(cudaMemsetAsync(out, 0, 2 * sizeof(A), stream));
    return;
  }
  static_assert(sizeof(Sums) == 3 * sizeof(double) && sizeof(About) == 4 * sizeof(double));
  const Tensor workspace = empty(summary, {3 * pieces + 4 * tensors}, ScalarType::Double);
  Sums* const partial = static_cast<Sums*>(workspace.data_ptr());
  About* const about = reinterpret_cast<About*>(partial + pieces);

  int64_t pieces_before = 0, tensors_before = 0;
  const Tensors* const read[3] = {&theta, &g, &v};
  for_each_table(read, [&](const Table<3>& table, const std::vector<size_t>& members) {
    SumsCall<T> call{table, {}, {}, partial, about, pieces_before, tensors_before};
    for (size_t i = 0; i < members.size(); ++i) {
      call.factor[i] = factors[members[i]];
      call.is_weight[i] = theta[members[i]].dim() >= 2;
    }
    const int blocks = table.first_piece[table.count];
    sums<T, A><<<blocks, kSweepThreads, 0, stream>>>(call);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    pieces_before += blocks, tensors_before += table.count;
  });
  bool first = true;
  const Tensors* const written[4] = {&theta, &v, &ahead, &behind};
  for_each_table(written, [&](const Table<4>& table, const std::vector<size_t>& members) {
    PointsCall<T, A> call{table, {}, partial, about, tensors, radius, first ? out : nullptr};
    for (size_t i = 0; i < members.size(); ++i) call.factor[i] = factors[members[i]];
    points<T, A><<<table.first_piece[table.count], kSweepThreads, 0, stream>>>(call);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    first = false;
  });
}

std::tuple<Tensors, Tensors, Tensor> perturb(Tensors theta, Tensors g, Tensors v, std::vector<double> factors,
                                             double radius, bool both) {
  STD_TORCH_CHECK(!theta.empty() && factors.size() == theta.size(), "perturb: needs a tensor, and a factor for each");
  check_lists(theta, g);
  check_lists(theta, v);
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const cudaStream_t stream = current_stream(theta[0].get_device_index());
  Tensors ahead = empty_like(theta), behind = both ? empty_like(theta) : Tensors{};
  const ScalarType type = theta[0].scalar_type();
  Tensor summary = empty(theta[0], {2}, accumulate_type(type));
  switch (type) {
    case ScalarType::Float: run<float, float>(theta, g, v, factors, radius, ahead, behind, summary, stream); break;
    case ScalarType::Double: run<double, double>(theta, g, v, factors, radius, ahead, behind, summary, stream); break;
    case ScalarType::BFloat16:
      run<__nv_bfloat16, float>(theta, g, v, factors, radius, ahead, behind, summary, stream);
      break;
    case ScalarType::Half: run<__half, float>(theta, g, v, factors, radius, ahead, behind, summary, stream); break;
    default: STD_TORCH_CHECK(false, "perturb: parameters must be fp64, fp32, bf16 or fp16");
  }
  return {ahead, behind, summary};
}

}  // namespace
}  // namespace kdfast::cuda::perturb

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) { m.impl("perturb", TORCH_BOX(&kdfast::cuda::perturb::perturb)); }
