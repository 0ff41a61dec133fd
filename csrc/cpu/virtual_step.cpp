// virtual_step on the CPU: where a step of torch.optim.SGD would lead, out of place, over a list of tensors.
//
//   d = g + weight_decay theta,   b = momentum buffer + (1 - dampening) d   (d in the first step)
//   theta+ = theta - lr (d | b | d + momentum b with Nesterov's)
//
// Fused: the whole rule, one sweep. Memory: read theta, g and the buffer, write theta+: 16 bytes an element in fp32, 12
// without a buffer.
#include "../stable.h"
#include "pieces.h"
#include "vec.h"

namespace kdfast::cpu {
namespace {

// The rule is linear: theta+ = keep theta - by_gradient g - by_buffer b would be fewer operations, and other roundings
// than the optimizer's, which would show for small lr.
template <class A>
struct Rule {
  A lr, weight_decay, momentum, undamped;  // undamped: 1 - dampening
  bool nesterov;
};

template <bool Buffered, class A, class T>
KDFAST_INLINE void step_of(const T* theta, const T* g, const T* buffer, const Rule<A>& rule, T* out, int64_t n) {
  const A lr = rule.lr, decay = rule.weight_decay, momentum = rule.momentum, undamped = rule.undamped;
  const A look_ahead = rule.nesterov ? momentum : A(0);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const A t = widen(theta[j]), d = widen(g[j]) + decay * t;
    A b = d;
    if constexpr (Buffered) b = momentum * widen(buffer[j]) + undamped * d;
    narrow(t - lr * (rule.nesterov ? d + look_ahead * b : b), &out[j]);
  }
}

// What is compiled once for each kind of vector unit.
#define KDFAST_LOOPS(T, A)                                                                                             \
  KDFAST_CLONES void step(const T* theta, const T* g, const T* buffer, const Rule<A>& rule, T* out, int64_t n) {       \
    buffer == nullptr ? step_of<false>(theta, g, buffer, rule, out, n) : step_of<true>(theta, g, buffer, rule, out, n); \
  }
KDFAST_LOOPS(float, float)
KDFAST_LOOPS(double, double)
KDFAST_LOOPS(BFloat16Bits, float)
KDFAST_LOOPS(HalfBits, float)
#undef KDFAST_LOOPS

using Tensors = std::vector<Tensor>;

Tensors virtual_step(Tensors theta, Tensors g, Tensors buffers, double lr, double weight_decay, double momentum,
                     double dampening, bool nesterov) {
  STD_TORCH_CHECK(!theta.empty(), "virtual_step: needs a tensor");
  check_lists(theta, g);
  if (momentum == 0) buffers.clear();
  if (!buffers.empty()) check_lists(theta, buffers);
  Tensors out = empty_like(theta);
  const std::vector<Piece> pieces = cut(theta);
  const auto run = [&]<class T, class A>(T*, A) {
    const Rule<A> rule{static_cast<A>(lr), static_cast<A>(weight_decay), static_cast<A>(momentum),
                       static_cast<A>(1 - dampening), nesterov && momentum != 0};
    for_each_piece(pieces, [&](int64_t, const Piece& p) {
      step(at<const T>(theta, p), at<const T>(g, p), buffers.empty() ? nullptr : at<const T>(buffers, p), rule,
           at<T>(out, p), p.count);
    });
  };
  switch (theta[0].scalar_type()) {
    case ScalarType::Float: run(static_cast<float*>(nullptr), 0.0f); break;
    case ScalarType::Double: run(static_cast<double*>(nullptr), 0.0); break;
    case ScalarType::BFloat16: run(static_cast<BFloat16Bits*>(nullptr), 0.0f); break;
    case ScalarType::Half: run(static_cast<HalfBits*>(nullptr), 0.0f); break;
    default: STD_TORCH_CHECK(false, "virtual_step: parameters must be fp64, fp32, bf16 or fp16");
  }
  return out;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("virtual_step", TORCH_BOX(&kdfast::cpu::virtual_step)); }
