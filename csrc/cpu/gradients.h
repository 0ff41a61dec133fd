// Memory for large results, kept for the next one when a tensor is freed.
//
// A gradient is new memory at every step, and the operating system hands out new memory page by page, each cleared first:
// 3 of 10 ms of kd_kl at 512 x 32000, half of it at 256 x 1000. malloc gives large blocks back at once; so they are kept
// here, up to kMost bytes, oldest given back first, and the largest lie in huge pages. Below kLeast malloc keeps its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "../stable.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdfast::cpu {

// Outputs from here on stay in no cache.
inline bool is_large(size_t bytes) { return bytes >= (size_t{32} << 20); }

class KeptMemory {
 public:
  static constexpr size_t kLeast = size_t{256} << 10, kMost = size_t{512} << 20;

  static KeptMemory& instance() {
    static KeptMemory* const memory = new KeptMemory;  // never destroyed: tensors may be freed after everything else
    return *memory;
  }

  struct Block {
    void* data;
    size_t capacity;
  };

  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t best = kept_.size();
    for (size_t i = 0; i < kept_.size(); ++i) {  // at most a quarter more than asked for
      const size_t capacity = kept_[i].capacity;
      if (capacity >= bytes && capacity <= bytes + bytes / 4 && (best == kept_.size() || capacity < kept_[best].capacity)) best = i;
    }
    if (best == kept_.size()) return allocate(bytes);
    const Block block = kept_[best];
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(best));
    bytes_ -= block.capacity;
    return block;
  }

  void give_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (block.capacity > kMost) return std::free(block.data);
    while (bytes_ + block.capacity > kMost) {
      bytes_ -= kept_.front().capacity;
      std::free(kept_.front().data);
      kept_.erase(kept_.begin());
    }
    bytes_ += block.capacity;
    kept_.push_back(block);
  }

 private:
  static Block allocate(size_t bytes) {
    constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;
    const bool huge = bytes >= 2 * kHugePage;
    const size_t capacity = (bytes + kPage - 1) / kPage * kPage;
    void* memory = nullptr;
    if (posix_memalign(&memory, huge ? kHugePage : kPage, capacity) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (huge) (void)madvise(memory, capacity, MADV_HUGEPAGE);  // a wish: where it is refused everything works as before
#endif
    return {memory, capacity};
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  size_t bytes_ = 0;
};

// A new tensor of the shape, type and strides of another, whose elements lie without gaps.
inline Tensor empty_gradient(const Tensor& like) {
  const size_t bytes = static_cast<size_t>(like.numel()) * like.element_size();
#if defined(__SANITIZE_ADDRESS__)
  constexpr bool kKeep = false;  // so that nothing is written behind its end unseen
#else
  constexpr bool kKeep = true;
#endif
  if (!kKeep || bytes < KeptMemory::kLeast) return kdfast::empty_like(like);
  const KeptMemory::Block block = KeptMemory::instance().take(bytes);
  return torch::stable::from_blob(block.data, like.sizes(), like.strides(), like.device(), like.scalar_type(),
                                  [block](void*) { KeptMemory::instance().give_back(block); });
}

}  // namespace kdfast::cpu
