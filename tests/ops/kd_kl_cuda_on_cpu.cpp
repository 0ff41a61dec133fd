// kd_kl's CUDA kernels and their launchers as a CPU runs them (cuda_fibers/), for test_kd_kl_cuda_on_cpu.py.
#include <utility>

#include "csrc/cuda/kd_kl_launch.cuh"

namespace kdfast::cuda {
thread_local uint4 memory_of_slots[232448 / sizeof(uint4)];  // which a kernel declares extern
}
using namespace kdfast::cuda;

namespace {
template <class Use>
int with_launch(int family, bool mapped, const Use& use) {
  if (family == kJsd) return use(Launch<kJsd, true>{});
  if (family == kDkd) return use(Launch<kDkd, true>{});
  return mapped ? use(Launch<kKl, true>{}) : use(Launch<kKl, false>{});
}
}  // namespace

extern "C" {
void gpu(int shared_bytes, int largest_cluster) {
  emulated::shared_bytes = shared_bytes, emulated::largest_cluster = largest_cluster;
}
void order(bool backwards) { emulated::backwards = backwards; }
int launches() { return std::exchange(emulated::launches, 0); }
int cluster_seen() { return emulated::cluster_seen; }
int forward_parts(int family, bool mapped, const Request* r) {
  return with_launch(family, mapped, [&](auto launch) { return launch.forward_parts(*r); });
}
int forward(int family, bool mapped, const Request* r) {
  return with_launch(family, mapped, [&](auto launch) { return int(launch.forward(*r)); });
}
int backward(int family, bool mapped, const Request* r) {
  return with_launch(family, mapped, [&](auto launch) { return int(launch.backward(*r)); });
}
int value_and_grad(int family, bool mapped, const Request* r) {
  return with_launch(family, mapped, [&](auto launch) { return int(launch.value_and_grad(*r)); });
}
}
