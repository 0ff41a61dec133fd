// Runs CUDA kernels on a CPU, thread by thread, where there is no GPU to run them on: a block's threads are fibers
// that give way at barriers and shuffles, and blocks follow one another. Slow, and true to what the program says, in
// any order of threads (KDFAST_ORDER: forward, backward, or shuffled by a seed): a missing barrier shows as a
// difference between orders, a shuffle that not all lanes of a warp reach as an error.
// Stands in for cuda_runtime.h, cuda_bf16.h and cuda_fp16.h; used by test_pathways_cuda_on_cpu.py.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using __nv_bfloat16 = torch::headeronly::BFloat16;
using __half = torch::headeronly::Half;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline void __stwb(uint4* to, uint4 value) { *to = value; }
inline int __ffs(int x) { return __builtin_ffs(x); }

using cudaStream_t = void*;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return 0;
}

namespace on_cpu {

constexpr int kWarpSize = 32, kStack = 256 << 10, kSharedMemory = 228 << 10;
alignas(16) inline unsigned char dynamic[kSharedMemory];

enum State { kReady, kAtBarrier, kAtShuffle, kDone };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state = kDone;
  int shuffles = 0;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current;
inline uint64_t slots[2][1024];  // what lanes show each other, for every other shuffle

inline void give_way(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}
inline void enter() {
  body();
  fibers[current].state = kDone;
}

inline bool release(unsigned begin, unsigned end, State waiting, bool done_counts) {
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].state != waiting && !(done_counts && fibers[i].state == kDone)) return false;
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].state == waiting) fibers[i].state = kReady;
  return true;
}

inline void run_block(unsigned threads, const std::vector<unsigned>& order) {
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(kStack), fiber.state = kReady, fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    bool moved = false;
    for (unsigned i : order) {
      if (fibers[i].state != kReady) continue;
      current = i, threadIdx.x = i, moved = true;
      swapcontext(&scheduler, &fibers[i].context);
    }
    for (unsigned w = 0; w < threads; w += kWarpSize)
      moved = release(w, w + kWarpSize, kAtShuffle, false) || moved;
    if (std::all_of(fibers.begin(), fibers.begin() + threads, [](const Fiber& f) { return f.state == kDone; })) return;
    moved = release(0, threads, kAtBarrier, true) || moved;
    if (!moved) std::fprintf(stderr, "threads wait for others that never come\n"), std::abort();
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, int memory, void*, const Args&... args) {
  if (memory > kSharedMemory) std::fprintf(stderr, "too much shared memory\n"), std::abort();
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  const char* chosen = std::getenv("KDFAST_ORDER");
  const int seed = chosen == nullptr ? 0 : std::atoi(chosen);
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  gridDim = {blocks}, blockDim = {threads};
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    std::memset(dynamic, 0xff, sizeof(dynamic));  // NaN to whoever reads what nobody wrote
    body = [&] { kernel(args...); };
    run_block(threads, order);
  }
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::give_way(on_cpu::kAtBarrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int step) {
  using namespace on_cpu;
  const unsigned self = current;
  uint64_t* shown = slots[fibers[self].shuffles++ & 1];
  std::memcpy(&shown[self], &value, sizeof(T));
  give_way(kAtShuffle);
  std::memcpy(&value, &shown[self ^ static_cast<unsigned>(step)], sizeof(T));
  return value;
}

// What the launchers ask of torch and the driver.
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define STD_CUDA_CHECK(call) (void)(call)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() (void)0
namespace kdfast {
inline cudaStream_t current_stream(int) { return nullptr; }
}  // namespace kdfast
