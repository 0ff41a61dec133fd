// virtual_step on the GPU: where a step of torch.optim.SGD would lead, out of place, over a list of tensors.
//
//   d = g + weight_decay theta,   b = momentum buffer + (1 - dampening) d   (d in the first step)
//   theta+ = theta - lr (d | b | d + momentum b with Nesterov's)
//
// Fused: the whole rule. One launch for up to kTensors tensors, and one more for each further table of them.
// Memory: read theta, g and the buffer, write theta+: 16 bytes an element in fp32, 12 without a buffer.
#include "tensors.cuh"

namespace kdfast::cuda::virtual_step {
namespace {

template <class A>
struct Rule {
  A lr, weight_decay, momentum, undamped;  // undamped: 1 - dampening
  bool nesterov;
};

template <class A>
struct Call {
  Table<4> table;  // theta, g, buffer (or null); theta+
  Rule<A> rule;
};

template <class T, class A, bool Buffered>
__global__ void __launch_bounds__(kSweepThreads, 2) step(const __grid_constant__ Call<A> call) {
  const Place place = place_of(call.table, blockIdx.x);
  const auto pointer = [&](int k) { return static_cast<T*>(call.table.pointers[k][place.tensor]) + place.begin; };
  const Rule<A> rule = call.rule;
  T* const out[1] = {pointer(3)};
  const auto stepped = [&](A theta, A d, A b) { return theta - rule.lr * (rule.nesterov ? d + rule.momentum * b : b); };
  if constexpr (Buffered) {
    const T* const in[3] = {pointer(0), pointer(1), pointer(2)};
    sweep<T, A>(in, out, place.count, [&](const A(&x)[3], A(&y)[1]) {
      const A d = x[1] + rule.weight_decay * x[0];
      y[0] = stepped(x[0], d, rule.momentum * x[2] + rule.undamped * d);
    });
  } else {
    const T* const in[2] = {pointer(0), pointer(1)};
    sweep<T, A>(in, out, place.count, [&](const A(&x)[2], A(&y)[1]) {
      const A d = x[1] + rule.weight_decay * x[0];
      y[0] = stepped(x[0], d, d);
    });
  }
}

using Tensors = std::vector<Tensor>;

template <class T, class A>
void run(const Tensors& theta, const Tensors& g, const Tensors& buffers, const Rule<double>& rule, const Tensors& out,
         cudaStream_t stream) {
  const Tensors* const lists[4] = {&theta, &g, &buffers, &out};
  for_each_table(lists, [&](const Table<4>& table, const std::vector<size_t>&) {
    const Call<A> call{table,
                       {static_cast<A>(rule.lr), static_cast<A>(rule.weight_decay), static_cast<A>(rule.momentum),
                        static_cast<A>(rule.undamped), rule.nesterov}};
    const auto kernel = buffers.empty() ? step<T, A, false> : step<T, A, true>;
    kernel<<<table.first_piece[table.count], kSweepThreads, 0, stream>>>(call);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensors virtual_step(Tensors theta, Tensors g, Tensors buffers, double lr, double weight_decay, double momentum,
                     double dampening, bool nesterov) {
  STD_TORCH_CHECK(!theta.empty(), "virtual_step: needs a tensor");
  check_lists(theta, g);
  if (momentum == 0) buffers.clear();
  if (!buffers.empty()) check_lists(theta, buffers);
  const torch::stable::accelerator::DeviceGuard guard(theta[0].get_device_index());
  const cudaStream_t stream = current_stream(theta[0].get_device_index());
  Tensors out = empty_like(theta);
  const Rule<double> rule{lr, weight_decay, momentum, 1 - dampening, nesterov && momentum != 0};
  switch (theta[0].scalar_type()) {
    case ScalarType::Float: run<float, float>(theta, g, buffers, rule, out, stream); break;
    case ScalarType::Double: run<double, double>(theta, g, buffers, rule, out, stream); break;
    case ScalarType::BFloat16: run<__nv_bfloat16, float>(theta, g, buffers, rule, out, stream); break;
    case ScalarType::Half: run<__half, float>(theta, g, buffers, rule, out, stream); break;
    default: STD_TORCH_CHECK(false, "virtual_step: parameters must be fp64, fp32, bf16 or fp16");
  }
  return out;
}

}  // namespace
}  // namespace kdfast::cuda::virtual_step

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) { m.impl("virtual_step", TORCH_BOX(&kdfast::cuda::virtual_step::virtual_step)); }
