// kd_kl's kernels for decoupled distillation.
#include "kd_kl_launch.cuh"

template struct kdfast::cuda::Launch<kdfast::cuda::kDkd, true>;
