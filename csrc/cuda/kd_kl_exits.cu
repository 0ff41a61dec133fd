// kd_kl_exits on CUDA: losses and gradients of several exits in one launch, the exits along the grid's second axis.
//
//   losses[k] = coefficient sum over rows of kd_kl(students[k], teachers[k], labels);  gradients of both sides
//
// Fused: kd_kl's value_and_grad (kd_kl_fused.cuh), the row kept on chip between its sweeps, for up to kExits exits whose
// pointers are passed by value, and a second launch that sums each exit's rows. Rows too long for a block's shared memory
// (28,000 classes in fp32 on sm_90), fp64, and more exits go exit by exit through forward and backward.
// Memory: an exit's 3 passes over [rows, classes] (read s, t; write ds): 12 bytes an element in fp32, 6 in bf16; with the
// teachers' gradients 4 passes.
// Source: Liu et al., MetaDistiller, ECCV 2020, eq. 3-4; docs/math/kd_kl_exits.md.
#include <vector>

#include "kd_kl_launch.cuh"
#include "launch.h"

namespace kdfast::cuda {

extern template struct Launch<kKl, false>;  // kd_kl_plain.cu

namespace {

constexpr int kExits = 16;  // a launch

template <class F>
struct Exits {
  CallOf<F> call;  // of the first exit; losses and statistics of the others follow its own
  const typename F::T *student[kExits], *teacher[kExits];
  typename F::T *student_grad[kExits], *teacher_grad[kExits];
};

template <class F, class Group>
__global__ void KDFAST_BOUNDS(F, Group, true) exits_value_and_grad(const Exits<F> exits) {
  const int k = blockIdx.y;
  CallOf<F> call = exits.call;
  call.student = exits.student[k], call.teacher = exits.teacher[k];
  call.student_grad = exits.student_grad[k], call.teacher_grad = exits.teacher_grad[k];
  call.loss += k * call.rows, call.stats += k * call.rows * kStats;
  value_and_grad_of<F, Group>(call);
}

// losses[k] = coefficient * sum of exit k's rows, a block an exit, in one order.
template <class A>
__global__ void __launch_bounds__(1024) sum_exits(const A* rows_of_all, int64_t rows, A coefficient, A* losses) {
  const BlockGroup group(0);
  const A* of_rows = rows_of_all + blockIdx.x * rows;
  double sum = 0;
  for (int64_t i = group.lane; i < rows; i += group.lanes) sum += of_rows[i];
  group.reduce(sum, [](double& x, int lanes) { x = sum_over(x, lanes); });
  if (group.lane == 0) losses[blockIdx.x] = static_cast<A>(coefficient * sum);
}

using Tensors = std::vector<Tensor>;

// What is one exit's of a call that is set up but for it.
Request of_exit(Request r, const Tensors& s, const Tensors& t, const Tensors& ds, const Tensors& dt, size_t k) {
  const int64_t size = r.storage == kDouble ? 8 : 4;
  r.student = s[k].data_ptr(), r.teacher = t[k].data_ptr();
  r.student_grad = ds[k].data_ptr(), r.teacher_grad = dt.empty() ? nullptr : dt[k].data_ptr();
  r.loss = static_cast<char*>(r.loss) + size * r.rows * static_cast<int64_t>(k);
  r.stats = static_cast<char*>(r.stats) + size * r.rows * kStats * static_cast<int64_t>(k);
  return r;
}

// All exits at once; cudaErrorNotSupported, and nothing launched, where a row does not fit into a block's memory.
template <class F>
cudaError_t together(const Request& first, const Tensors& s, const Tensors& t, const Tensors& ds, const Tensors& dt) {
  using T = typename F::T;
  Exits<F> exits{};
  exits.call = make_call<T, typename F::A>(of_exit(first, s, t, ds, dt, 0));
  for (size_t k = 0; k < s.size(); ++k) {
    const Request r = of_exit(first, s, t, ds, dt, k);
    exits.student[k] = static_cast<const T*>(r.student), exits.teacher[k] = static_cast<const T*>(r.teacher);
    exits.student_grad[k] = static_cast<T*>(r.student_grad), exits.teacher_grad[k] = static_cast<T*>(r.teacher_grad);
    exits.call.aligned = exits.call.aligned && is_aligned(r.student) && is_aligned(r.teacher) &&
                         is_aligned(r.student_grad) && is_aligned(r.teacher_grad);
  }
  const int chunks = chunks_of(first.classes, F::N);
  const unsigned count = static_cast<unsigned>(s.size());
  Limits limits;
  if (auto e = limits_of(first.device, limits)) return e;
  const auto start = [&](void (*kernel)(Exits<F>), unsigned blocks, int threads, int64_t bytes) {
    if (auto e = allow_shared(kernel, bytes, limits)) return e;
    return launch(kernel, dim3(blocks, count), threads, first.stream, exits, bytes);
  };
  if (first.classes <= kNarrow) {
    const unsigned blocks = share_warps(exits.call, chunks);
    return start(exits_value_and_grad<F, LaneGroup>, blocks, kNarrowThreads,
                 slots_bytes(chunks, exits.call.lanes, kNarrowThreads));
  }
  const int threads = wide_threads<F, true>(chunks);
  const int64_t bytes = slots_bytes(chunks, threads, threads);
  if (bytes > limits.shared) return cudaErrorNotSupported;
  return start(exits_value_and_grad<F, BlockGroup>, static_cast<unsigned>(first.rows), threads, bytes);
}

cudaError_t one_by_one(const Request& first, const Tensors& s, const Tensors& t, const Tensors& ds, const Tensors& dt,
                       const Tensor& grad) {
  using Plain = Launch<kKl, false>;
  const int64_t parts = Plain::forward_parts(first);
  const Tensor workspace = empty(grad, {parts > 1 ? first.rows * parts * kPart : 0}, grad.scalar_type());
  for (size_t k = 0; k < s.size(); ++k) {
    Request r = of_exit(first, s, t, ds, dt, k);
    r.parts = workspace.data_ptr();
    if (auto e = Plain::forward(r)) return e;
    if (auto e = Plain::backward(r)) return e;
  }
  return cudaSuccess;
}

std::tuple<Tensor, Tensors, Tensors> kd_kl_exits(
    Tensors students, Tensors teachers, OptionalTensor labels, double tau_s, double tau_t, double alpha,
    double label_smoothing, int64_t ignore_index, int64_t divergence, int64_t scale, double beta, double target_weight,
    double softcap, double logit_scale, double coefficient, bool teacher_grads) {
  STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size(), "kd_kl_exits: needs as many students as teachers");
  STD_TORCH_CHECK(divergence <= kSoftCE && softcap == 0 && logit_scale == 1, "kd_kl_exits: for the plain divergences");
  const Tensor& like = students[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const ScalarType type = accumulate_type(like.scalar_type());
  const int64_t exits = static_cast<int64_t>(students.size()), rows = like.size(0);
  STD_TORCH_CHECK(like.size(1) < (int64_t(1) << 30), "kd_kl_exits: more than 2^30 classes");
  grid_of(rows);
  const auto new_like = [](const Tensor& x) { return empty(x, {x.size(0), x.size(1)}, x.scalar_type()); };
  Tensors ds, dt;
  for (const Tensor& x : students) ds.push_back(new_like(x));
  if (teacher_grads) for (const Tensor& x : teachers) dt.push_back(new_like(x));
  const Tensor of_rows = empty(like, {exits, rows}, type), stats = empty(like, {exits, rows, kStats}, type);
  Tensor losses = empty(like, {exits}, type);

  Request r{};
  r.labels = {labels.has_value() ? labels->data_ptr() : nullptr, 1};
  r.loss = of_rows.data_ptr(), r.stats = stats.data_ptr();
  r.tau_s = tau_s, r.tau_t = tau_t, r.alpha = alpha, r.label_smoothing = label_smoothing;
  r.ignore_index = ignore_index, r.coefficient = coefficient;
  r.divergence = static_cast<int>(divergence), r.scale = static_cast<int>(scale);
  r.beta = beta, r.target_weight = target_weight, r.logit_scale = 1;
  r.rows = rows, r.classes = static_cast<int>(like.size(1));
  r.device = like.get_device_index(), r.stream = current_stream(r.device);
  with_types(like.scalar_type(), [&](auto storage, auto real) {
    using F = Form<decltype(storage), decltype(real), kKl, false>;
    r.storage = std::is_same_v<typename F::T, double> ? kDouble : std::is_same_v<typename F::T, float> ? kFloat
                : std::is_same_v<typename F::T, __half> ? kHalf : kBFloat16;
    if (rows > 0) {
      cudaError_t error = cudaErrorNotSupported;
      if constexpr (!std::is_same_v<typename F::A, double>) {
        if (exits <= kExits) error = together<F>(r, students, teachers, ds, dt);
      }
      check(error == cudaErrorNotSupported ? one_by_one(r, students, teachers, ds, dt, losses) : error, "kd_kl_exits");
    }
    using A = typename F::A;
    sum_exits<<<static_cast<unsigned>(exits), 1024, 0, r.stream>>>(
        static_cast<const A*>(of_rows.data_ptr()), rows, static_cast<A>(coefficient), static_cast<A*>(losses.data_ptr()));
    check(cudaGetLastError(), "kd_kl_exits");
  });
  return {losses, ds, dt};
}

}  // namespace
}  // namespace kdfast::cuda

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) { m.impl("kd_kl_exits", TORCH_BOX(&kdfast::cuda::kd_kl_exits)); }
