// kd_kl's kernels for the Kullback-Leibler divergences and soft cross-entropy, of logits as they are.
#include "kd_kl_launch.cuh"

template struct kdfast::cuda::Launch<kdfast::cuda::kKl, false>;
