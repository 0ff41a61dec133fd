// kd_kl's kernels for the generalised Jensen-Shannon divergence.
#include "kd_kl_launch.cuh"

template struct kdfast::cuda::Launch<kdfast::cuda::kJsd, true>;
