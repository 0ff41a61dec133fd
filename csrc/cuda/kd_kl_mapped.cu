// kd_kl's kernels for the Kullback-Leibler divergences and soft cross-entropy, of capped or scaled logits.
#include "kd_kl_launch.cuh"

template struct kdfast::cuda::Launch<kdfast::cuda::kKl, true>;
