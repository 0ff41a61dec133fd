// Launchers of pathways' CUDA kernels, which stand in pathways.cuh and pathways_attention.cuh, and their registration.
#include <algorithm>
#include <bit>
#include <iterator>
#include <numeric>
#include <vector>

#include "../stable.h"
#include "pathways_attention.cuh"

namespace kdfast::cuda::pathways {
namespace {

// Shared memory a block: what is aimed at where there is a choice, so that several blocks share a multiprocessor, and
// what is used at most, which every GPU from sm_80 on has.
constexpr int kAim = 32 << 10, kMost = 72 << 10;

struct Maps {
  const std::vector<Tensor>&students, &teachers;
  OptionalTensor keep;
  int64_t distance, resize;
};

// Do the elements lie in this order without gaps? Sides of 1 have no order.
bool lies(const Tensor& x, const int (&order)[4]) {
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    if (x.size(order[i]) > 1 && x.stride(order[i]) != stride) return false;
    stride *= x.size(order[i]);
  }
  return true;
}
bool planes_last(const Tensor& x) { return lies(x, {0, 1, 2, 3}); }
bool channels_last(const Tensor& x) { return lies(x, {0, 2, 3, 1}); }

Tensor empty_like(const Tensor& x) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      x.dim(), x.sizes().data(), x.strides().data(), static_cast<int32_t>(x.scalar_type()),
      aoti_torch_device_type_cuda(), x.get_device(), &handle));
  return Tensor(handle);
}

std::vector<Tensor> gradients(const std::vector<Tensor>& maps, bool wanted) {
  std::vector<Tensor> out;
  if (wanted) std::transform(maps.begin(), maps.end(), std::back_inserter(out), empty_like);
  return out;
}

struct Plan {
  Pair pair;
  int64_t blocks;
  int memory;  // bytes
};

// Several whole planes in registers, as many as give every thread its share.
template <class T, class A>
bool plan_planes(Pair& pair, const Pooling& pooling, int64_t planes) {
  constexpr int N = kChunk<T>;
  const int64_t pixels = static_cast<int64_t>(pair.height) * pair.width;
  if (pixels > kTile<A>) return false;
  int64_t fit = std::min(kTile<A> / pixels, static_cast<int64_t>(kTile<A> / (pooling.cells + pooling.windows)));
  const int64_t whole = N / std::gcd(pixels, static_cast<int64_t>(N));  // planes that end at a chunk's end
  if (fit >= whole) fit -= fit % whole;
  else if (fit * pixels > kTile<A> - N) return false;  // chunks cut at memory's boundaries would be one too many
  pair.mode = kPlanes;
  pair.planes = static_cast<int>(std::min(fit, planes));
  int atom = N;
  const int width = pooling.x.whole() || pooling.x.exact ? pair.width / pooling.x.cells : 1;
  while (width % atom != 0) atom /= 2;
  pair.atom = static_cast<unsigned char>(std::countr_zero(static_cast<unsigned>(atom)));
  pair.stage = static_cast<int>(pair.planes * pixels >> pair.atom);
  return true;
}

// Some channels of one sample, d in shared memory if it fits.
template <class T, class A>
void plan_any_layout(Pair& pair, int numbers, bool stage) {
  constexpr int N = kChunk<T>;
  constexpr int64_t aim = kAim / sizeof(A), most = kMost / sizeof(A), sector = 32 / sizeof(T);
  const int64_t plane = (static_cast<int64_t>(pair.height) * pair.width | 1) + numbers;
  const bool last = pair.student_last || pair.teacher_last;
  int64_t fit = std::max(aim / plane, last && sector * plane <= most ? sector : 1);
  pair.vectors = pair.vectors && stage && std::max<int64_t>(fit, N) * plane <= most;
  if (pair.vectors) fit = std::max<int64_t>(fit - fit % N, N);
  pair.mode = kAnyLayout;
  pair.planes = static_cast<int>(std::min<int64_t>(fit, pair.channels));
  stage = stage && pair.planes * plane <= most;
  pair.stage = stage ? static_cast<int>(pair.planes * (plane - numbers)) : 0;
}

template <class T, class A>
Plan make_plan(const Maps& maps, size_t p, const Tensor* student_grad, const Tensor* teacher_grad) {
  const Tensor &student = maps.students[p], &teacher = maps.teachers[p];
  Pair pair{};
  const auto pointer = [](const Tensor* x) { return x == nullptr ? nullptr : x->data_ptr(); };
  pair.student = student.data_ptr(), pair.teacher = teacher.data_ptr();
  pair.student_grad = pointer(student_grad), pair.teacher_grad = pointer(teacher_grad);
  if (student.numel() == 0 || teacher.numel() == 0) return {pair, 0, 0};
  for (const Tensor& x : {student, teacher}) {
    STD_TORCH_CHECK(x.size(1) * x.size(2) * x.size(3) < (int64_t(1) << 31), "pathways: a sample of 2^31 elements");
    STD_TORCH_CHECK(planes_last(x) || channels_last(x), "pathways: maps must be contiguous or channels_last");
  }
  pair.samples = static_cast<int>(student.size(0)), pair.channels = static_cast<int>(student.size(1));
  pair.teacher_channels = static_cast<int>(teacher.size(1));
  pair.height = static_cast<int>(teacher.size(2)), pair.width = static_cast<int>(teacher.size(3));
  pair.in_height = static_cast<int>(student.size(2)), pair.in_width = static_cast<int>(student.size(3));
  pair.student_last = !planes_last(student), pair.teacher_last = !planes_last(teacher);
  pair.aligned = true;
  for (const void* x : {pair.student, pair.teacher, const_cast<const void*>(pair.student_grad),
                        const_cast<const void*>(pair.teacher_grad)})
    pair.aligned = pair.aligned && reinterpret_cast<uintptr_t>(x) % 16 == 0;  // null is

  const int64_t planes = student.size(0) * student.size(1);
  if (maps.distance == kAttention) {
    pair.vectors = pair.aligned;
    pair.stage = pair.height * pair.width;
    return {pair, pair.samples, static_cast<int>(sizeof(A)) * kThreads * kChunk<T>};  // and the maps
  }
  pair.top = static_cast<unsigned char>(maps.distance == kHcl ? top_level(pair.height) : 0);
  const bool same = pair.height == pair.in_height && pair.width == pair.in_width;
  const bool alike = same && pair.student_last == pair.teacher_last;
  if (alike && pair.top == 0) {
    pair.mode = kFlat, pair.planes = kTile<A>;
    return {pair, (student.numel() + kTile<A> - 1) / kTile<A>, 0};
  }
  const Pooling pooling(pair.height, pair.width, std::max<int>(pair.top, 1));
  const int numbers = pair.top > 0 ? pooling.cells + pooling.windows : 0;
  const bool in_registers = alike && !pair.student_last && plan_planes<T, A>(pair, pooling, planes);
  if (!in_registers) {
    pair.vectors = alike && pair.aligned && pair.channels % kChunk<T> == 0 && pair.student_last;
    plan_any_layout<T, A>(pair, numbers, pair.top > 0 || student_grad != nullptr || teacher_grad != nullptr);
  }
  const int64_t groups = (pair.channels + pair.planes - 1) / pair.planes;
  const int64_t blocks = in_registers ? (planes + pair.planes - 1) / pair.planes : pair.samples * groups;
  return {pair, blocks, static_cast<int>(sizeof(A)) * (pair.stage + pair.planes * numbers)};
}

template <class T, class A>
auto kernel_of(int64_t distance, bool any_layout) {
  switch (distance) {
    case kMse: return any_layout ? pixels<T, A, kMse, true> : pixels<T, A, kMse, false>;
    case kL1: return any_layout ? pixels<T, A, kL1, true> : pixels<T, A, kL1, false>;
    case kHcl: return any_layout ? pixels<T, A, kHcl, true> : pixels<T, A, kHcl, false>;
    default: return attention<T, A>;
  }
}

// Distances where `distances` is given, gradients where there are any.
template <class T, class A>
void run(const Maps& maps, const OptionalTensor& coefficient, const Tensor* distances,
         const std::vector<Tensor>& student_grads, const std::vector<Tensor>& teacher_grads) {
  const Tensor& like = maps.students.front();
  std::vector<Plan> plans;
  int64_t all_blocks = 0;
  int64_t largest = 0;  // positions of the largest attention map
  for (size_t p = 0; p < maps.students.size(); ++p) {
    plans.push_back(make_plan<T, A>(maps, p, student_grads.empty() ? nullptr : &student_grads[p],
                                    teacher_grads.empty() ? nullptr : &teacher_grads[p]));
    all_blocks += plans.back().blocks;
    largest = std::max<int64_t>(largest, plans.back().pair.stage);
  }
  STD_TORCH_CHECK(all_blocks < (int64_t(1) << 31), "pathways: too many elements for one launch");
  Tensor partials, scratch;
  if (distances != nullptr) partials = empty(like, {all_blocks}, distances->scalar_type());
  const bool by_attention = maps.distance == kAttention;
  const int64_t of_maps = by_attention ? 2 * largest * static_cast<int64_t>(sizeof(A)) : 0;
  const bool in_scratch = by_attention && of_maps + kThreads * kChunk<T> * sizeof(A) > kMost;
  if (in_scratch) scratch = empty(like, {all_blocks * 2 * largest}, accumulate_type(like.scalar_type()));

  const bool any_layout =
      std::any_of(plans.begin(), plans.end(), [](const Plan& plan) { return plan.pair.mode == kAnyLayout; });
  const auto kernel = kernel_of<T, A>(maps.distance, any_layout);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like.get_device_index());
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost));
  int64_t before = 0;
  for (size_t begin = 0; begin < plans.size(); begin += kMaxPairs) {
    Call<T, A> call{};
    call.count = static_cast<int>(std::min<size_t>(kMaxPairs, plans.size() - begin));
    call.bilinear = maps.resize == kBilinear;
    if (maps.keep.has_value()) call.keep = static_cast<const bool*>(maps.keep->data_ptr()) + begin;
    if (coefficient.has_value()) {
      const int64_t stride = coefficient->stride(0);
      call.coefficient = {static_cast<const A*>(coefficient->data_ptr()) + begin * stride, stride};
    }
    if (distances != nullptr) {
      call.partials = static_cast<A*>(partials.data_ptr()) + before;
      call.distances = static_cast<A*>(distances->data_ptr()) + begin;
    }
    if (in_scratch) call.scratch = static_cast<A*>(scratch.data_ptr()) + before * 2 * largest;
    int64_t blocks = 0;
    int memory = 0;
    for (int i = 0; i < call.count; ++i) {
      Plan& plan = plans[begin + i];
      plan.pair.first_block = static_cast<int>(blocks);
      if (by_attention) plan.pair.stage = static_cast<int>(largest);
      call.pairs[i] = plan.pair;
      blocks += plan.blocks, memory = std::max(memory, plan.memory);
    }
    if (!in_scratch) memory += static_cast<int>(of_maps);
    if (blocks > 0) {
      kernel<<<static_cast<unsigned>(blocks), kThreads, memory, stream>>>(call);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (distances != nullptr) {
      finish<T, A><<<call.count, kThreads, 0, stream>>>(call, static_cast<int>(blocks));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    before += blocks;
  }
}

void dispatch(const Maps& maps, const OptionalTensor& coefficient, const Tensor* distances,
              const std::vector<Tensor>& student_grads, const std::vector<Tensor>& teacher_grads) {
  const auto with = [&](auto call) {
    using C = decltype(call);
    run<typename C::Storage, typename C::Sum>(maps, coefficient, distances, student_grads, teacher_grads);
  };
  switch (maps.students.front().scalar_type()) {
    case ScalarType::Float: return with(Call<float, float>{});
    case ScalarType::Double: return with(Call<double, double>{});
    case ScalarType::BFloat16: return with(Call<__nv_bfloat16, float>{});
    case ScalarType::Half: return with(Call<__half, float>{});
    default: STD_TORCH_CHECK(false, "pathways: maps must be fp64, fp32, bf16 or fp16");
  }
}

Tensor new_distances(const std::vector<Tensor>& students) {
  return empty(students.front(), {static_cast<int64_t>(students.size())},
               accumulate_type(students.front().scalar_type()));
}

Tensor pathways_forward(std::vector<Tensor> students, std::vector<Tensor> teachers, OptionalTensor keep,
                        int64_t distance, int64_t resize) {
  Tensor distances = new_distances(students);
  dispatch({students, teachers, keep, distance, resize}, {}, &distances, {}, {});
  return distances;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> pathways_backward(
    Tensor grad, std::vector<Tensor> students, std::vector<Tensor> teachers, OptionalTensor keep, int64_t distance,
    int64_t resize, bool student_grad, bool teacher_grad) {
  std::vector<Tensor> by_student = gradients(students, student_grad), by_teacher = gradients(teachers, teacher_grad);
  if (student_grad || teacher_grad)
    dispatch({students, teachers, keep, distance, resize}, grad, nullptr, by_student, by_teacher);
  return {by_student, by_teacher};
}

std::tuple<Tensor, std::vector<Tensor>> pathways_value_and_grad(std::vector<Tensor> students,
                                                                std::vector<Tensor> teachers, Tensor weights,
                                                                OptionalTensor keep, int64_t distance,
                                                                int64_t resize) {
  Tensor distances = new_distances(students);
  std::vector<Tensor> by_student = gradients(students, true);
  dispatch({students, teachers, keep, distance, resize}, weights, &distances, by_student, {});
  return {distances, by_student};
}

}  // namespace
}  // namespace kdfast::cuda::pathways

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("pathways", TORCH_BOX(&kdfast::cuda::pathways::pathways_forward));
  m.impl("pathways_backward", TORCH_BOX(&kdfast::cuda::pathways::pathways_backward));
  m.impl("pathways_value_and_grad", TORCH_BOX(&kdfast::cuda::pathways::pathways_value_and_grad));
}
