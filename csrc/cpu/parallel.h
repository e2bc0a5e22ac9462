// Threads and scratch memory. Linked against OpenMP's library by name only: the process already holds torch's, whose
// idle threads these calls reuse. Two thread pools on one machine would spin against each other. On macOS, where a
// second copy of OpenMP's library ends the process, the system's own threads do the work.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>

#if defined(__APPLE__)
#include <dispatch/dispatch.h>
#elif defined(_OPENMP)
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
  const int team = n < threads ? static_cast<int>(n) : threads;
#if defined(__APPLE__)
  if (team > 1) {
    struct Pieces {
      const body_t& body;
      int64_t n, count;
    } pieces = {body, n, team};
    dispatch_apply_f(static_cast<size_t>(team), DISPATCH_APPLY_AUTO, &pieces, [](void* context, size_t piece) {
      const Pieces& of = *static_cast<const Pieces*>(context);
      const int64_t k = static_cast<int64_t>(piece);
      of.body(of.n * k / of.count, of.n * (k + 1) / of.count);
    });
    return;
  }
#elif defined(_OPENMP)
  if (team > 1) {
#pragma omp parallel num_threads(team)
    {
      const int64_t size = omp_get_num_threads(), k = omp_get_thread_num();
      body(n * k / size, n * (k + 1) / size);
    }
    return;
  }
#endif
  (void)team;
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
