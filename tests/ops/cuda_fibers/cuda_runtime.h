// As much of CUDA as kdfast's kernels use, on a CPU, so that their very code runs where there is no GPU. A test
// includes the kernels' files with this folder first among the include paths, and launches them as on a GPU.
//
// A block is one OS thread, its shared memory that thread's thread_local variables. The block's threads are
// fibers, resumed in turn; a barrier or shuffle waits until all that take part have arrived, and a program in
// which some never do is aborted. The blocks of a grid run one after the other, those of a cluster at once.
// Arithmetic is the host's. What this cannot show: races that need lockstep, alignment, speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local

// ---------------------------------------------------------------- types
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline void __stwb(uint4* to, uint4 value) { *to = value; }
inline int __ffs(int x) { return __builtin_ffs(x); }

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {  // to nearest even
    uint32_t b;
    std::memcpy(&b, &x, 4);
    bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t b = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &b, 4);
    return x;
  }
};
using __half = _Float16;

// ---------------------------------------------------------------- a block of fibers
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
inline thread_local char shared_anchor;  // shared memory of another block lies at the same distance from its own

namespace emulated {

struct Cluster {
  unsigned blocks;
  std::barrier<> barrier;
  std::vector<char*> anchors;
  explicit Cluster(unsigned n) : blocks(n), barrier(n), anchors(n) {}
};

struct Barrier {
  int arrived = 0;
  long generation = 0;
};

struct Block {
  static constexpr size_t kStack = 128 * 1024;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    int turn = 0;
    alignas(16) unsigned char sent[2][16];
  };
  ucontext_t main;
  std::vector<Fiber> fibers;
  std::vector<Barrier> of_warp;
  Barrier of_block;
  int current = 0;
  long arrivals = 0;
  std::function<void()> body;
  Cluster* cluster;
};
inline thread_local Block* block;
inline bool backwards = false;  // the order in which threads are resumed

inline void enter() {
  block->body();
  block->fibers[block->current].done = true;
  swapcontext(&block->fibers[block->current].context, &block->main);
}

// Last in does `then`, everyone leaves after it.
template <class Then>
void wait(Barrier& barrier, int threads, const Then& then) {
  const long mine = barrier.generation;
  ++block->arrivals;
  if (++barrier.arrived == threads) {
    then();
    barrier.arrived = 0, ++barrier.generation;
  }
  while (barrier.generation == mine) swapcontext(&block->fibers[block->current].context, &block->main);
}

inline void run_block(unsigned threads, const std::function<void()>& body, Cluster* cluster) {
  Block b{};
  b.fibers = std::vector<Block::Fiber>(threads);
  b.of_warp.resize((threads + 31) / 32);
  b.body = body, b.cluster = cluster;
  block = &b;
  cluster->anchors[blockIdx.x % cluster->blocks] = &shared_anchor;
  cluster->barrier.arrive_and_wait();
  for (auto& fiber : b.fibers) {
    getcontext(&fiber.context);
    fiber.stack.reset(new char[Block::kStack]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = Block::kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left > 0;) {
    const long before = b.arrivals + left;
    unsigned running = 0;
    for (unsigned turn = 0; turn < threads; ++turn) {
      const unsigned i = backwards ? threads - 1 - turn : turn;
      if (b.fibers[i].done) continue;
      b.current = i, threadIdx = dim3(i);
      swapcontext(&b.main, &b.fibers[i].context);
      running += !b.fibers[i].done;
    }
    const long after = b.arrivals + running;
    left = running;
    if (left > 0 && before == after) {
      std::fprintf(stderr, "a barrier or shuffle that not all threads reach\n");
      std::abort();
    }
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block->of_block, blockDim.x, [] {}); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int step) {
  auto& b = *emulated::block;
  auto& me = b.fibers[b.current];
  const int slot = ++me.turn & 1, partner = b.current ^ step;  // two slots: the next exchange may begin before all have read
  std::memcpy(me.sent[slot], &x, sizeof(T));
  emulated::wait(b.of_warp[b.current / 32], 32, [] {});
  std::memcpy(&x, b.fibers[partner].sent[slot], sizeof(T));
  return x;
}

namespace cooperative_groups {
struct Cluster {
  unsigned block_rank() const { return blockIdx.x % num_blocks(); }
  unsigned num_blocks() const { return emulated::block->cluster->blocks; }
  void sync() const {
    auto& b = *emulated::block;
    emulated::wait(b.of_block, blockDim.x, [&] { b.cluster->barrier.arrive_and_wait(); });
  }
  template <class T>
  T* map_shared_rank(T* mine, unsigned rank) const {
    return reinterpret_cast<T*>(emulated::block->cluster->anchors[rank] +
                                (reinterpret_cast<char*>(mine) - &shared_anchor));
  }
};
inline Cluster this_cluster() { return {}; }
}  // namespace cooperative_groups

// ---------------------------------------------------------------- the runtime
enum cudaError_t { cudaSuccess = 0, cudaErrorNotSupported = 801 };
using cudaStream_t = void*;
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrClusterLaunch };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  int64_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

namespace emulated {
// The GPU that is played: shared memory a block may have, the largest cluster; and what was asked of it.
inline int shared_bytes = 232448, largest_cluster = 16, launches = 0, cluster_seen = 0;
inline std::map<const void*, int> allowed_shared;  // by kernel
}  // namespace emulated

inline cudaError_t cudaDeviceGetAttribute(int* out, int attribute, int) {
  *out = attribute == cudaDevAttrClusterLaunch ? emulated::largest_cluster > 1 : emulated::shared_bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, int attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    emulated::allowed_shared[reinterpret_cast<const void*>(kernel)] = value;
  }
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* out, Kernel, const cudaLaunchConfig_t* config) {
  *out = config->attrs->val.clusterDim.x <= static_cast<unsigned>(emulated::largest_cluster);
  return cudaSuccess;
}

template <class C>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(C), const std::type_identity_t<C>& call) {
  // A kernel that asked for no more has 48 KB, what it declares itself included: 1 KB and more of reductions.
  const auto asked = emulated::allowed_shared.find(reinterpret_cast<const void*>(kernel));
  const int allowed = asked == emulated::allowed_shared.end() ? 47 << 10 : asked->second;
  emulated::allowed_shared.clear();  // so that no test depends on another's
  if (config->dynamicSmemBytes > std::min(allowed, emulated::shared_bytes)) std::abort();
  const unsigned blocks = config->numAttrs > 0 ? config->attrs->val.clusterDim.x : 1;
  if (config->gridDim.x % blocks != 0) std::abort();
  ++emulated::launches, emulated::cluster_seen = blocks;
  for (unsigned y = 0; y < config->gridDim.y; ++y) {
    for (unsigned x = 0; x < config->gridDim.x; x += blocks) {
      emulated::Cluster cluster(blocks);
      const auto block = [&](unsigned rank) {
        gridDim = config->gridDim, blockDim = config->blockDim, blockIdx = dim3(x + rank, y);
        emulated::run_block(blockDim.x, [&] { kernel(call); }, &cluster);
      };
      std::vector<std::thread> others;
      for (unsigned rank = 1; rank < blocks; ++rank) others.emplace_back(block, rank);
      block(0);
      for (auto& thread : others) thread.join();
    }
  }
  return cudaSuccess;
}
