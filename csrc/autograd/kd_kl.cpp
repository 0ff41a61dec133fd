// kd_kl's plain call in eager code, without Python between the user and the kernel: checks, op, graph node, backward.
//
//   loss = coefficient * sum of the row losses;  node keeps d loss / d student, made in the same sweep
//
// At 128 x 10 a step took 35 us by an autograd.Function in Python, 8 of them the kernel's; this way it takes 21. What is
// not plain (a transform, a mode, a subclass, learned temperatures, another device, ...) gets None from here, and the
// caller goes the general way. A backward that is itself differentiated, batched, or a second one is handed to the
// general way's Functions in Python, `again`.
//
// Torch's C++ autograd has no stable ABI: this module is built for one torch and loaded beside that one alone.
// Source: docs/math/kd_kl.md, and kdfast/ops/kd_kl.py, whose KdKlNow it is.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>

namespace kdfast {
namespace {

namespace py = pybind11;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// kdfast/reference/kd_kl.py's Options, in its order.
enum Option { TAU_S, TAU_T, ALPHA, SMOOTHING, IGNORE_INDEX, DIVERGENCE, SCALE, BETA, TARGET_WEIGHT, SOFTCAP, LOGIT_SCALE, OPTIONS };
constexpr std::array<bool, OPTIONS> WHOLE = {false, false, false, false, true, true, true, false, false, false, false};
constexpr int64_t DKD = 4;  // it reads labels whatever alpha is
using Options = std::array<c10::IValue, OPTIONS>;

PyObject* again = nullptr;  // kdfast.ops.kd_kl.again; lives as long as the process

// Torch up to 2.12 holds nodes by shared_ptr, then by intrusive_ptr.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::make_intrusive<N>();
  } else {
    return std::make_shared<N>();
  }
}

// Strided memory on the CPU and no more: no wrapper of a transform, no subclass with a dispatch of its own, no view that
// is conjugated or negated when read.
bool plain(const at::Tensor& x) {
  static const c10::DispatchKeySet usual({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView,
                                          c10::DispatchKey::AutogradFunctionality, c10::DispatchKey::AutocastCPU});
  return x.unsafeGetTensorImpl()->key_set() - usual == c10::DispatchKeySet(c10::BackendComponent::CPUBit);
}

struct KdKlNow : public Node {
  at::Tensor student_grad;  // [rows, classes], until a backward takes it
  SavedVariable student, teacher, labels, stats;
  Options options;
  double coefficient;

  std::string name() const override { return "KdKlNow"; }

  variable_list apply(variable_list&& incoming) override {
    const at::Tensor& grad = incoming[0];
    if (!grad.defined()) return {at::Tensor()};
    at::Tensor ds;
    {
      const std::scoped_lock lock(mutex_);
      ds = std::move(student_grad);  // given away: a second backward makes its own
    }
    if (!ds.defined() || at::GradMode::is_enabled() || !plain(grad)) return {differentiable(grad)};
    const double factor = grad.item<double>();
    if (factor != 1.0) ds.mul_(factor);
    return {std::move(ds)};
  }

  void release_variables() override {
    const std::scoped_lock lock(mutex_);
    for (SavedVariable* saved : {&student, &teacher, &labels, &stats}) saved->reset_data();
    student_grad.reset();
  }

  at::Tensor differentiable(const at::Tensor& grad) {
    const at::Tensor s = student.unpack(), t = teacher.unpack(), st = stats.unpack();
    const at::Tensor y = labels.unpack();  // undefined, which Python sees as None
    py::gil_scoped_acquire gil;
    py::tuple numbers(static_cast<py::size_t>(OPTIONS));
    for (int i = 0; i < OPTIONS; ++i) {
      numbers[i] = WHOLE[i] ? py::object(py::int_(options[i].toInt())) : py::object(py::float_(options[i].toDouble()));
    }
    return py::handle(again)(grad, s, t, y, st, numbers, coefficient).cast<at::Tensor>();
  }
};

bool undisturbed() {
  return at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::impl::torch_function_mode_enabled() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

// The student's and teacher's logits [rows, classes] as tensors, or nothing where the call is not plain.
const at::Tensor* exact(PyObject* x) { return THPVariable_CheckExact(x) ? &THPVariable_Unpack(x) : nullptr; }

const at::Tensor* logits(py::handle given) {
  const at::Tensor* x = exact(given.ptr());
  if (x == nullptr || !plain(*x) || x->dim() != 2 || x->size(1) == 0 || !x->is_contiguous()) return nullptr;
  switch (x->scalar_type()) {
    case at::kFloat: case at::kDouble: case at::kBFloat16: case at::kHalf: return x;
    default: return nullptr;
  }
}

// The loss, or None where the call is not plain, or is wrong: the general way finds out and says what.
py::object kd_kl_now(py::handle student_logits, py::handle teacher_logits, py::handle labels, const py::tuple& numbers,
                     bool over_rows) {
  const at::Tensor* student = logits(student_logits);
  const at::Tensor* teacher = logits(teacher_logits);
  if (student == nullptr || teacher == nullptr || !student->requires_grad() || teacher->requires_grad() ||
      student->sizes() != teacher->sizes() || student->scalar_type() != teacher->scalar_type() || !undisturbed()) {
    return py::none();
  }
  const at::Tensor* classes = nullptr;
  if (!labels.is_none()) {
    classes = exact(labels.ptr());
    if (classes == nullptr || !plain(*classes) || classes->scalar_type() != at::kLong || classes->dim() != 1 ||
        classes->size(0) != student->size(0) || !classes->is_contiguous()) {
      return py::none();
    }
  }
  Options options;
  for (int i = 0; i < OPTIONS; ++i) {
    PyObject* number = PyTuple_GET_ITEM(numbers.ptr(), i);
    options[i] = WHOLE[i] ? c10::IValue(static_cast<int64_t>(PyLong_AsLongLong(number)))
                          : c10::IValue(PyFloat_AsDouble(number));
  }
  if (options[DIVERGENCE].toInt() == DKD) return py::none();
  const double coefficient = over_rows ? 1.0 / std::max<int64_t>(student->size(0), 1) : 1.0;

  static const c10::OperatorHandle op =
      c10::Dispatcher::singleton().findSchemaOrThrow("kdfast::kd_kl_value_and_grad", "");
  torch::jit::Stack stack;
  stack.reserve(9 + OPTIONS);
  const c10::IValue nothing;
  for (const at::Tensor* x : {student, teacher}) stack.emplace_back(*x);
  for (int i = 0; i < 2; ++i) stack.push_back(nothing);  // temperatures as tensors
  stack.push_back(classes == nullptr ? nothing : c10::IValue(*classes));
  for (int i = 0; i < 2; ++i) stack.push_back(nothing);  // target, weight
  for (const c10::IValue& option : options) stack.push_back(option);
  stack.emplace_back(false);  // no gradient in the temperatures
  stack.emplace_back(coefficient);
  {
    const at::AutoDispatchBelowAutograd below;  // straight to the kernel
    op.callBoxed(stack);
  }
  at::Tensor loss = std::move(stack[0]).toTensor();
  const double value = loss.item<double>();
  if (value != value) return py::none();  // a NaN has a cause, which the general way looks for

  auto node = make_node<KdKlNow>();
  node->set_next_edges(torch::autograd::collect_next_edges(*student));
  node->student = SavedVariable(*student, false);
  node->teacher = SavedVariable(*teacher, false);
  if (classes != nullptr) node->labels = SavedVariable(*classes, false);
  node->stats = SavedVariable(stack[1].toTensor(), false);
  node->student_grad = std::move(stack[2]).toTensor();
  node->options = std::move(options);
  node->coefficient = coefficient;
  torch::autograd::set_history(loss, std::move(node));
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(loss)));
}

}  // namespace
}  // namespace kdfast

PYBIND11_MODULE(_C_autograd, m) {
  m.doc() = "Graph nodes of kdfast in C++, for the torch they were built with.";
  m.def("kd_kl_now", &kdfast::kd_kl_now, "student_logits, teacher_logits, labels, options, over_rows -> loss or None");
  m.def("on_second_order", [](pybind11::object f) { kdfast::again = f.release().ptr(); },
        "Who makes a gradient that is differentiated itself.");
}
