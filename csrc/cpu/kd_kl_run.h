// One call of kd_kl on the CPU, as kd_kl.cpp runs it: for its own ops, and for those of several exits (kd_kl_exits.cpp).
#pragma once

#include "../stable.h"

namespace kdfast::cpu {

struct Inputs {
  Tensor student, teacher;                                      // [rows, classes]
  OptionalTensor student_temperature, teacher_temperature;      // [1] or [rows]
  OptionalTensor labels, target, weight;                        // [rows], [rows, classes], [rows]
  double tau_s, tau_t, alpha, label_smoothing;
  int64_t ignore_index, divergence, scale;
  double beta, target_weight, softcap, logit_scale;
};

struct Outputs {
  Tensor *loss = nullptr, *stats = nullptr, *student_grad = nullptr, *teacher_grad = nullptr;  // each may be absent
  const Tensor* grad = nullptr;  // [rows] factors of the gradients; absent: coefficient for every row
  double coefficient = 1.0;
  bool temperature_grad = false;
};

void run(const Inputs& in, const Outputs& out);

}  // namespace kdfast::cpu
