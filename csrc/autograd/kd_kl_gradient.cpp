// kd_kl's gradient as a graph node, in eager code: what is differentiated where a gradient is differentiated.
//
//   ds = grad * d loss / d student,  dt likewise;   the node's backward is the kernel of kd_kl_hvp, with grad its row weight
//
// By an autograd.Function in Python the backward at 128 x 100 was slower than eager PyTorch's, most of it Python and a
// product nobody asked for: a Function does not know which of its gradients somebody waits for, a node does. What is not
// plain (learned temperatures, class probabilities, a further derivative, many cotangents, ...) is done by the Function's
// formulas in Python, `product`.
//
// Source: docs/math/kd_kl_hvp.md, and kdfast/ops/kd_kl.py, whose KdKlBackward it is.
#include "nodes.h"

namespace kdfast {
namespace {

constexpr int64_t SOFT_CE = 2;  // the last divergence the kernel knows

PyObject* product = nullptr;  // kdfast.ops.kd_kl.second_order; lives as long as the process

struct KdKlGradient : public Node {
  SavedVariable grad, student, teacher, labels, weight, stats;
  Options options;
  bool of_student, of_teacher;  // which gradients are the outputs

  std::string name() const override { return "KdKlGradient"; }

  variable_list apply(variable_list&& cotangents) override {
    at::Tensor w[2];
    size_t next = 0;
    if (of_student) w[0] = cotangents[next++];
    if (of_teacher) w[1] = cotangents[next++];
    if (!w[0].defined() && !w[1].defined()) return {at::Tensor(), at::Tensor(), at::Tensor()};
    const at::Tensor g = grad.unpack(), s = student.unpack(), t = teacher.unpack(), y = labels.unpack(),
                     per_row = weight.unpack();
    const bool of_grad = task_should_compute_output(0), on_student = task_should_compute_output(1),
               on_teacher = task_should_compute_output(2);
    bool known = !of_grad && !at::GradMode::is_enabled() && unobserved();
    for (const at::Tensor& x : w) known = known && (!x.defined() || (plain(x) && x.scalar_type() == s.scalar_type()));
    if (!known) return composed(g, s, t, y, per_row, w, {of_grad, on_student, on_teacher});

    const at::AutoDispatchBelowAutograd below;
    static const c10::OperatorHandle op = find_op("kdfast::kd_kl_hvp");
    const at::Tensor rows = per_row.defined() ? g.mul(per_row) : g.contiguous();
    torch::jit::Stack stack;
    stack.reserve(13 + OPTIONS);
    push(stack, &s), push(stack, &t);
    push_nothing(stack, 2);  // temperatures as tensors
    push(stack, &y);
    push_nothing(stack, 1);  // target
    push(stack, &rows);
    for (at::Tensor& x : w) {
      if (x.defined()) x = x.contiguous();
      push(stack, &x);
    }
    push_nothing(stack, 2);  // directions of the temperatures
    for (const c10::IValue& option : options) stack.push_back(option);
    stack.emplace_back(on_student), stack.emplace_back(on_teacher);
    op.callBoxed(stack);
    return {at::Tensor(), on_student ? std::move(stack[0]).toTensor() : at::Tensor(),
            on_teacher ? std::move(stack[1]).toTensor() : at::Tensor()};
  }

  variable_list composed(const at::Tensor& g, const at::Tensor& s, const at::Tensor& t, const at::Tensor& y,
                         const at::Tensor& per_row, const at::Tensor (&w)[2], const std::array<bool, 3>& wanted) {
    const at::Tensor st = stats.unpack();
    py::gil_scoped_acquire gil;
    const py::object none = py::none();
    const py::tuple inputs = py::make_tuple(s, t, none, none, y, none, per_row);
    const py::list found = py::handle(product)(g, inputs, st, as_tuple(options),
                                               py::make_tuple(of_student, of_teacher, false, false),
                                               py::make_tuple(w[0], w[1], none, none),
                                               py::make_tuple(wanted[0], wanted[1], wanted[2], false, false));
    variable_list out;
    for (int i = 0; i < 3; ++i) out.push_back(found[i].is_none() ? at::Tensor() : found[i].cast<at::Tensor>());
    return out;
  }

  void release_variables() override {
    const std::scoped_lock lock(mutex_);
    for (SavedVariable* saved : {&grad, &student, &teacher, &labels, &weight, &stats}) saved->reset_data();
  }
};

// Numbers of a type [rows], one for each row of the logits, or nothing.
const at::Tensor* a_row(py::handle given, const at::Tensor& student, at::ScalarType type) {
  const at::Tensor* x = exact(given.ptr());
  return x != nullptr && plain(*x) && x->scalar_type() == type && x->dim() == 1 && x->size(0) == student.size(0) ? x : nullptr;
}

// The gradients asked for, or None where the call is not plain.
py::object kd_kl_gradient(py::handle grad, py::handle student_logits, py::handle teacher_logits, py::handle labels,
                          py::handle weight, const at::Tensor& stats, const py::tuple& numbers, bool of_student,
                          bool of_teacher) {
  const at::Tensor *student = logits(student_logits), *teacher = logits(teacher_logits);
  if (student == nullptr || teacher == nullptr || !at::GradMode::is_enabled() || !unobserved()) return py::none();
  const at::Tensor* rows = a_row(grad, *student, stats.scalar_type());
  const at::Tensor* classes = labels.is_none() ? nullptr : class_indices(labels, *student);
  const at::Tensor* per_row = weight.is_none() ? nullptr : a_row(weight, *student, stats.scalar_type());
  Options options = options_of(numbers);
  if (rows == nullptr || !plain(stats) || (classes == nullptr && !labels.is_none()) ||
      (per_row == nullptr && !weight.is_none()) || options[DIVERGENCE].toInt() > SOFT_CE ||
      options[SOFTCAP].toDouble() != 0 || options[LOGIT_SCALE].toDouble() != 1) {
    return py::none();
  }
  auto node = make_node<KdKlGradient>();
  node->set_next_edges(torch::autograd::collect_next_edges(*rows, *student, *teacher));

  static const c10::OperatorHandle op = find_op("kdfast::kd_kl_backward");
  torch::jit::Stack stack;
  stack.reserve(11 + OPTIONS);
  at::Tensor factors, weights;  // as the kernels read them
  {
    const at::AutoDispatchBelowAutograd below;
    factors = rows->contiguous();
    if (per_row != nullptr) weights = per_row->contiguous();
    push(stack, &factors), push(stack, student), push(stack, teacher);
    push_nothing(stack, 2);  // temperatures as tensors
    push(stack, classes);
    push_nothing(stack, 1);  // target
    push(stack, &weights);
    push(stack, &stats);
    for (const c10::IValue& option : options) stack.push_back(option);
    stack.emplace_back(of_student), stack.emplace_back(of_teacher);
    op.callBoxed(stack);
  }
  node->grad = SavedVariable(rows->requires_grad() ? *rows : factors, false);
  node->student = SavedVariable(*student, false);
  node->teacher = SavedVariable(*teacher, false);
  if (classes != nullptr) node->labels = SavedVariable(*classes, false);
  if (per_row != nullptr) node->weight = SavedVariable(weights, false);
  node->stats = SavedVariable(stats, false);
  node->options = std::move(options);
  node->of_student = of_student, node->of_teacher = of_teacher;
  py::list gradients;
  for (int i = 0; i < 2; ++i) {
    at::Tensor gradient;
    if (i == 0 ? of_student : of_teacher) {
      gradient = std::move(stack[i]).toTensor();
      torch::autograd::set_history(gradient, node);
    }
    gradients.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(gradient))));
  }
  return std::move(gradients);
}

}  // namespace

void define_kd_kl_gradient(py::module_& m) {
  m.def("kd_kl_gradient", &kd_kl_gradient,
        "grad, student, teacher, labels, weight, stats, options, of_student, of_teacher -> [ds or None, dt or None] or None");
  m.def("on_third_order", [](py::object f) { product = f.release().ptr(); },
        "Who makes the second order where the kernel does not.");
}

}  // namespace kdfast
