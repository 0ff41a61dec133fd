// What kd_kl's graph nodes in C++ share: their options, and when a call is plain enough for them.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>

namespace kdfast {

namespace py = pybind11;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// kdfast/reference/kd_kl.py's Options, in its order.
enum Option { TAU_S, TAU_T, ALPHA, SMOOTHING, IGNORE_INDEX, DIVERGENCE, SCALE, BETA, TARGET_WEIGHT, SOFTCAP, LOGIT_SCALE, OPTIONS };
constexpr std::array<bool, OPTIONS> WHOLE = {false, false, false, false, true, true, true, false, false, false, false};
using Options = std::array<c10::IValue, OPTIONS>;

inline Options options_of(const py::tuple& numbers) {
  Options options;
  for (int i = 0; i < OPTIONS; ++i) {
    PyObject* number = PyTuple_GET_ITEM(numbers.ptr(), i);
    options[i] = WHOLE[i] ? c10::IValue(static_cast<int64_t>(PyLong_AsLongLong(number)))
                          : c10::IValue(PyFloat_AsDouble(number));
  }
  return options;
}
inline py::tuple as_tuple(const Options& options) {
  py::tuple numbers(static_cast<py::size_t>(OPTIONS));
  for (int i = 0; i < OPTIONS; ++i) {
    numbers[i] = WHOLE[i] ? py::object(py::int_(options[i].toInt())) : py::object(py::float_(options[i].toDouble()));
  }
  return numbers;
}

// Torch up to 2.12 holds nodes by shared_ptr, then by intrusive_ptr.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::make_intrusive<N>();
  } else {
    return std::make_shared<N>();
  }
}

// Strided memory of a backend and no more: no wrapper of a transform, no subclass with a dispatch of its own, no view that
// is conjugated or negated when read.
constexpr c10::BackendComponent ON_CPU = c10::BackendComponent::CPUBit;
inline bool plain(const at::Tensor& x, c10::BackendComponent backend = ON_CPU) {
  static const c10::DispatchKeySet usual({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView,
                                          c10::DispatchKey::AutogradFunctionality, c10::DispatchKey::AutocastCPU,
                                          c10::DispatchKey::AutocastCUDA});
  return x.unsafeGetTensorImpl()->key_set() - usual == c10::DispatchKeySet(backend);
}

// Nobody has to see the operations inside a node: no transform, no mode, no tangents.
inline bool unobserved() {
  return !c10::InferenceMode::is_enabled() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::impl::torch_function_mode_enabled() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

inline const at::Tensor* exact(PyObject* x) { return THPVariable_CheckExact(x) ? &THPVariable_Unpack(x) : nullptr; }

// The student's or teacher's logits [rows, classes] as a tensor, or nothing where the call is not plain.
inline const at::Tensor* logits(py::handle given, c10::BackendComponent backend = ON_CPU) {
  const at::Tensor* x = exact(given.ptr());
  if (x == nullptr || !plain(*x, backend) || x->dim() != 2 || x->size(1) == 0 || !x->is_contiguous()) return nullptr;
  switch (x->scalar_type()) {
    case at::kFloat: case at::kDouble: case at::kBFloat16: case at::kHalf: return x;
    default: return nullptr;
  }
}

// Class indices [rows] that belong to them, likewise.
inline const at::Tensor* class_indices(py::handle given, const at::Tensor& student, c10::BackendComponent backend = ON_CPU) {
  const at::Tensor* x = exact(given.ptr());
  if (x == nullptr || !plain(*x, backend) || x->scalar_type() != at::kLong || x->dim() != 1 ||
      x->size(0) != student.size(0) || x->device() != student.device() || !x->is_contiguous()) {
    return nullptr;
  }
  return x;
}

inline void push(torch::jit::Stack& stack, const at::Tensor* x) {
  x == nullptr || !x->defined() ? stack.emplace_back() : stack.emplace_back(*x);
}
inline void push_nothing(torch::jit::Stack& stack, int count) { stack.resize(stack.size() + count); }

inline c10::OperatorHandle find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// What kd_kl.cpp's module takes from kd_kl_gradient.cpp.
void define_kd_kl_gradient(py::module_& m);

}  // namespace kdfast
