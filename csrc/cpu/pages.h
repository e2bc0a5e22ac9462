// Large pages for a large gradient: a fault for each 4 KiB of it takes several times as long as computing it.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace diffdoctor {
namespace {

// From here on the C library maps an allocation anew each time, whatever was freed before.
constexpr int64_t kAlwaysMapped = int64_t{32} << 20;

// Where the system leaves large pages to programs ("madvise"), asks for them for the whole ones within `data`, which is
// about to be written. Refused or unknown, nothing changes.
inline void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kAlwaysMapped) return;
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data), begin = (address + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace diffdoctor
