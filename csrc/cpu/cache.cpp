#include "cpu/cache.h"

#include <atomic>
#include <cinttypes>
#include <cstdio>

namespace diffdoctor {
namespace cpu {
namespace {

constexpr int64_t kUnknown = int64_t{32} << 20;

// As Linux says of the first processor: sysconf counts all caches of a socket, of which a core reaches one.
int64_t last_cache() {
  int64_t largest = 0;
#if defined(__linux__)
  for (int k = 0; k < 8; ++k) {
    char path[64];
    std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size", k);
    std::FILE* file = std::fopen(path, "r");
    if (file == nullptr) break;
    int64_t size = 0;
    char unit = ' ';
    if (std::fscanf(file, "%" SCNd64 "%c", &size, &unit) == 2) {
      const int64_t bytes = size << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0);
      largest = bytes > largest ? bytes : largest;
    }
    std::fclose(file);
  }
#endif
  return largest > 0 ? largest : kUnknown;
}

std::atomic<int64_t>& threshold() {
  static std::atomic<int64_t> bytes{last_cache()};
  return bytes;
}

}  // namespace

int64_t stream_from() { return threshold().load(std::memory_order_relaxed); }
void set_stream_from(int64_t bytes) { threshold().store(bytes, std::memory_order_relaxed); }

}  // namespace cpu
}  // namespace diffdoctor
