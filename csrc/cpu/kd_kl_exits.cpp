// kd_kl_exits on the CPU: kd_kl of each exit in turn, losses and gradients of all of them in one call.
//
//   losses[k] = coefficient sum over rows of kd_kl(students[k], teachers[k], labels);  gradients of both sides
//
// Fused: as kd_kl.cpp, of which each exit is one run; what is saved is K - 1 ways through the dispatcher and autograd.
// Memory: an exit's 3 passes over [rows, classes] (read s, t; write ds): 12 bytes an element in fp32, 6 in bf16; with the
// teachers' gradients 4 passes.
// Source: Liu et al., MetaDistiller, ECCV 2020, eq. 3-4; docs/math/kd_kl_exits.md.
#include <vector>

#include "gradients.h"
#include "kd_kl_row.h"
#include "kd_kl_run.h"
#include "rows.h"

namespace kdfast::cpu {
namespace {

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> kd_kl_exits(
    std::vector<Tensor> students, std::vector<Tensor> teachers, OptionalTensor labels, double tau_s, double tau_t,
    double alpha, double label_smoothing, int64_t ignore_index, int64_t divergence, int64_t scale, double beta,
    double target_weight, double softcap, double logit_scale, double coefficient, bool teacher_grads) {
  STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size(), "kd_kl_exits: needs as many students as teachers");
  const ScalarType type = accumulate_type(students[0].scalar_type());
  const int64_t rows = students[0].size(0), exits = static_cast<int64_t>(students.size());
  Tensor losses = empty(students[0], {exits}, type);
  Tensor of_rows = empty(students[0], {rows}, type), stats = empty(students[0], {rows, kStats}, type);
  std::vector<Tensor> ds, dt;
  for (int64_t k = 0; k < exits; ++k) {
    STD_TORCH_CHECK(students[k].size(0) == rows && students[k].scalar_type() == students[0].scalar_type(),
                    "kd_kl_exits: exits must have one shape and type");
    const Inputs in{students[k], teachers[k], {}, {}, labels, {}, {}, tau_s, tau_t, alpha, label_smoothing, ignore_index,
                    divergence, scale, beta, target_weight, softcap, logit_scale};
    ds.push_back(empty_gradient(students[k]));
    if (teacher_grads) dt.push_back(empty_gradient(teachers[k]));
    run(in, {.loss = &of_rows, .stats = &stats, .student_grad = &ds.back(),
             .teacher_grad = teacher_grads ? &dt.back() : nullptr, .coefficient = coefficient});
    write_scaled_sum(of_rows, coefficient, losses, k);
  }
  return {losses, ds, dt};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("kd_kl_exits", TORCH_BOX(&kdfast::cpu::kd_kl_exits)); }
