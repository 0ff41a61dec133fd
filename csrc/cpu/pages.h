// Big fresh outputs in huge pages. A gradient of 64 MiB is new memory at every step; faulted in by 4 KiB it costs twice
// the arithmetic (512 x 32000 fp32: 25 of 38 ms in the kernel of the operating system).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdfast::cpu {

// Outputs from here on stay in no cache, and malloc maps each of them anew; below, it hands out warm memory of its own.
inline bool is_large(size_t bytes) { return bytes >= (size_t{32} << 20); }

inline void want_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  // A wish: where it is refused (no such pages configured) everything works as before.
  if (is_large(bytes)) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace kdfast::cpu
