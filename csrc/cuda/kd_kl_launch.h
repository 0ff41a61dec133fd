// What kd_kl's registration (kd_kl.cu) asks of its launchers, which are compiled apart, one file a divergence.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace kdfast::cuda {

enum Family : int { kKl, kJsd, kDkd };
enum Storage : int { kFloat, kDouble, kBFloat16, kHalf };

// One call of the op: pointers to Storage, or to the arithmetic type (double for kDouble, else float).
struct Request {
  const void *student, *teacher;  // [rows, classes]
  struct Column {
    const void* data;
    int64_t stride;
  } student_temperature, teacher_temperature, labels, weight, grad;  // [1] or [rows], or null
  const void* target;                                                // [rows, classes], or null
  void *loss, *stats, *parts, *student_grad, *teacher_grad;
  double tau_s, tau_t, alpha, label_smoothing;
  int64_t ignore_index;
  int divergence, scale;
  double beta, target_weight, softcap, logit_scale, coefficient;
  bool temperature_grad;

  Storage storage;
  int64_t rows;
  int classes, device;
  cudaStream_t stream;
};

constexpr int kPart = 17;  // numbers a block hands on that shares a row with others

template <Family kFamily, bool kMapped>
struct Launch {
  // How many blocks share a row of the forward. Where more than one, it wants request.parts: [rows, parts, kPart]
  // numbers of the arithmetic type.
  static int forward_parts(const Request& request);
  static cudaError_t forward(const Request& request);
  static cudaError_t backward(const Request& request);
  // Loss, statistics and student_grad in one launch. cudaErrorNotSupported, and nothing launched, where a row
  // does not fit on chip.
  static cudaError_t value_and_grad(const Request& request);
};

}  // namespace kdfast::cuda
