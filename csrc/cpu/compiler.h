// What compilers spell each in their own way.
#pragma once

#if !defined(__GNUC__) && (defined(_M_X64) || defined(_M_IX86))
#include <xmmintrin.h>
#endif

#if defined(__GNUC__)
#define DD_NOINLINE __attribute__((noinline))
#elif defined(_MSC_VER)
#define DD_NOINLINE __declspec(noinline)
#else
#define DD_NOINLINE
#endif

// Before a loop whose steps do not depend on each other, and before one that adds up what is named. MSVC compiles none
// of them: inside such loops it would assume that no number is NaN.
#if defined(__GNUC__)
#define DD_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define DD_SIMD DD_PRAGMA(omp simd)
#define DD_SIMD_SUM(...) DD_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#else
#define DD_SIMD
#define DD_SIMD_SUM(...)
#endif

namespace diffdoctor {
namespace {

// The line at an address into the cache, to be read or to be written. Any address may be given.
inline void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0);
#elif defined(_M_X64) || defined(_M_IX86)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
#else
  (void)address;
#endif
}

inline void prefetch_to_write(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 1);
#else
  prefetch(address);
#endif
}

}  // namespace
}  // namespace diffdoctor
