// Threads and scratch memory. Linked against OpenMP's library by name only: the process already holds torch's, whose
// idle threads these calls reuse. Two thread pools on one machine would spin against each other.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace diffdoctor {
namespace {

inline int usable_threads(int threads, int64_t elements, int64_t grain) {
  const int64_t most = elements / grain + 1;
  return most < threads ? static_cast<int>(most) : (threads < 1 ? 1 : threads);
}

// body(begin, end) over [0, n) cut into one contiguous piece for each thread.
template <typename body_t>
void parallel_for(int64_t n, int threads, const body_t& body) {
#if defined(_OPENMP)
  if (threads > 1 && n > 1) {
    const int team = n < threads ? static_cast<int>(n) : threads;
#pragma omp parallel num_threads(team)
    {
      const int64_t size = omp_get_num_threads(), k = omp_get_thread_num();
      body(n * k / size, n * (k + 1) / size);
    }
    return;
  }
#endif
  (void)threads;
  body(0, n);
}

// Doubles on the heap; small ones on the stack.
struct Scratch {
  explicit Scratch(int64_t n) : data(n <= kLocal ? local : static_cast<double*>(std::malloc(sizeof(double) * n))) {
    if (!data) std::terminate();  // a few kilobytes for a sample: the process is already lost
  }
  ~Scratch() {
    if (data != local) std::free(data);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static constexpr int64_t kLocal = 64;
  double local[kLocal];
  double* const data;
};

}  // namespace
}  // namespace diffdoctor
