// Stores past the caches. A line that is stored as a whole this way is not read before; where a call moves more than
// the last cache holds, most of the gradient's lines would be.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace diffdoctor {
namespace {

#if defined(__SSE2__)
constexpr bool kCanStream = true;
#else
constexpr bool kCanStream = false;
#endif

// Copies `bytes` from a buffer that the cache holds, whole lines past the caches. finish_streams must follow in this
// thread.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  int64_t head = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(out)) & (kLine - 1);
  head = head < bytes ? head : bytes;
  std::memcpy(out, in, static_cast<size_t>(head));
  out += head, in += head, bytes -= head;
  for (; bytes >= kLine; bytes -= kLine, out += kLine, in += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#elif defined(__AVX__)
    for (int64_t k = 0; k < kLine; k += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + k),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + k)));
#else
    for (int64_t k = 0; k < kLine; k += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + k)));
#endif
  }
#endif
  std::memcpy(out, in, static_cast<size_t>(bytes));
}

// To other threads these stores come in no order without it.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace diffdoctor
