// kd_kl's plain call in eager code, without Python between the user and the kernel: checks, op, graph node, backward.
//
//   loss = coefficient * sum of the row losses;  node keeps d loss / d student, made in the same sweep
//
// At 128 x 10 a step took 35 us by an autograd.Function in Python, 8 of them the kernel's; this way it takes 21. On a GPU
// it is taken where fuse_backward is asked for, and reads no value there. What is not plain (a transform, a mode, a
// subclass, learned temperatures, ...) gets None from here, and the caller goes the general way. A backward that is
// itself differentiated, batched, or a second one is handed to the general way's Functions in Python, `again`.
//
// Torch's C++ autograd has no stable ABI: this module is built for one torch and loaded beside that one alone.
// Source: docs/math/kd_kl.md, and kdfast/ops/kd_kl.py, whose KdKlNow it is.
#include "nodes.h"

#include <optional>

namespace kdfast {
namespace {

constexpr int64_t DKD = 4;  // it reads labels whatever alpha is

PyObject* again = nullptr;  // kdfast.ops.kd_kl.again; lives as long as the process

struct KdKlNow : public Node {
  at::Tensor student_grad;  // [rows, classes], until a backward takes it
  SavedVariable student, teacher, labels, stats;
  Options options;
  double coefficient;
  c10::BackendComponent backend;

  std::string name() const override { return "KdKlNow"; }

  variable_list apply(variable_list&& incoming) override {
    const at::Tensor& grad = incoming[0];
    if (!grad.defined()) return {at::Tensor()};
    at::Tensor ds;
    {
      const std::scoped_lock lock(mutex_);
      ds = std::move(student_grad);  // given away: a second backward makes its own
    }
    if (!ds.defined() || at::GradMode::is_enabled() || !plain(grad, backend)) return {differentiable(grad)};
    if (backend != ON_CPU) {
      static const c10::OperatorHandle scale = find_op("kdfast::kd_kl_scale_");
      torch::jit::Stack stack;
      push(stack, &ds), push(stack, &grad);
      scale.callBoxed(stack);
    } else if (const double factor = grad.item<double>(); factor != 1.0) {
      ds.mul_(factor);
    }
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
    return py::handle(again)(grad, s, t, y, st, as_tuple(options), coefficient).cast<at::Tensor>();
  }
};

// The loss, or None where the call is not plain, or is wrong: the general way finds out and says what.
py::object kd_kl_now(py::handle student_logits, py::handle teacher_logits, py::handle labels, const py::tuple& numbers,
                     bool over_rows, bool fuse_backward) {
  const at::Tensor* given = exact(student_logits.ptr());
  if (given == nullptr) return py::none();
  const c10::BackendComponent backend = given->key_set().highestBackendKey();
  if (backend != ON_CPU && !fuse_backward) return py::none();
  const at::Tensor* student = logits(student_logits, backend);
  const at::Tensor* teacher = logits(teacher_logits, backend);
  if (student == nullptr || teacher == nullptr || !student->requires_grad() || teacher->requires_grad() ||
      student->sizes() != teacher->sizes() || student->scalar_type() != teacher->scalar_type() ||
      student->device() != teacher->device() || !at::GradMode::is_enabled() || !unobserved()) {
    return py::none();
  }
  const at::Tensor* classes = nullptr;
  if (!labels.is_none()) {
    classes = class_indices(labels, *student, backend);
    if (classes == nullptr) return py::none();
  }
  Options options = options_of(numbers);
  if (options[DIVERGENCE].toInt() == DKD) return py::none();
  const double coefficient = over_rows ? 1.0 / std::max<int64_t>(student->size(0), 1) : 1.0;

  static const c10::OperatorHandle op = find_op("kdfast::kd_kl_value_and_grad");
  torch::jit::Stack stack;
  stack.reserve(9 + OPTIONS);
  push(stack, student), push(stack, teacher);
  push_nothing(stack, 2);  // temperatures as tensors
  push(stack, classes);
  push_nothing(stack, 2);  // target, weight
  for (const c10::IValue& option : options) stack.push_back(option);
  stack.emplace_back(false);  // no gradient in the temperatures
  stack.emplace_back(coefficient);
  {
    const at::AutoDispatchBelowAutograd below;  // straight to the kernel
    op.callBoxed(stack);
  }
  at::Tensor loss = std::move(stack[0]).toTensor();
  if (backend == ON_CPU) {
    const double value = loss.item<double>();
    if (value != value) return py::none();  // a NaN has a cause, which the general way looks for
  }

  auto node = make_node<KdKlNow>();
  node->set_next_edges(torch::autograd::collect_next_edges(*student));
  node->student = SavedVariable(*student, false);
  node->teacher = SavedVariable(*teacher, false);
  if (classes != nullptr) node->labels = SavedVariable(*classes, false);
  node->stats = SavedVariable(stack[1].toTensor(), false);
  node->student_grad = std::move(stack[2]).toTensor();
  node->options = std::move(options);
  node->coefficient = coefficient;
  node->backend = backend;
  torch::autograd::set_history(loss, std::move(node));
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(loss)));
}

}  // namespace
}  // namespace kdfast

PYBIND11_MODULE(_C_autograd, m) {
  m.doc() = "Graph nodes of kdfast in C++, for the torch they were built with.";
  m.def("kd_kl_now", &kdfast::kd_kl_now,
        "student_logits, teacher_logits, labels, options, over_rows, fuse_backward -> loss or None");
  m.def("on_second_order", [](pybind11::object f) { kdfast::again = f.release().ptr(); },
        "Who makes a gradient that is differentiated itself.");
  kdfast::define_kd_kl_gradient(m);
}
