// Runs of elements to and from the accumulation type. Included by files built for different instruction sets:
// everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace diffdoctor {
namespace {

// Storage types of the direct paths. fp16 always goes through a buffer.
struct bfloat16 {
  uint16_t bits;
};

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(bfloat16 x) { return bfloat16_to_float(x.bits); }
inline void from_acc(float value, float* out) { *out = value; }
inline void from_acc(double value, double* out) { *out = value; }
inline void from_acc(float value, bfloat16* out) { out->bits = float_to_bfloat16(value); }

inline float half_to_float(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  return float16_to_float(bits);
#endif
}

inline void half_run(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = float16_to_float(in[i]);
}

inline void half_run_store(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) out[i] = float_to_float16(in[i]);
}

// The accumulation type's own code.
template <typename acc_t>
constexpr int32_t kAccDtype = sizeof(acc_t) == sizeof(double) ? kFloat64 : kFloat32;

// n elements from data[offset], `stride` apart, as acc_t.
template <typename acc_t>
void load_run(const void* data, int32_t dtype, int64_t offset, int64_t stride, int64_t n, acc_t* out) {
  if (stride == 0) {
    const acc_t value = load_element<acc_t>(data, dtype, offset);
    for (int64_t i = 0; i < n; ++i) out[i] = value;
    return;
  }
  if (stride == 1) {
    if (dtype == kFloat32) {
      const float* in = static_cast<const float*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<acc_t>(in[i]);
      return;
    }
    if (dtype == kBFloat16) {
      const uint16_t* in = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<acc_t>(bfloat16_to_float(in[i]));
      return;
    }
    if (dtype == kUInt8) {
      const uint8_t* in = static_cast<const uint8_t*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<acc_t>(in[i]) / acc_t(255);
      return;
    }
    if (dtype == kFloat16 && sizeof(acc_t) == sizeof(float)) {
      half_run(static_cast<const uint16_t*>(data) + offset, n, reinterpret_cast<float*>(out));
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) out[i] = load_element<acc_t>(data, dtype, offset + i * stride);
}

template <typename acc_t>
void store_run(void* data, int32_t dtype, int64_t offset, int64_t stride, int64_t n, const acc_t* in) {
  if (stride == 1 && dtype == kFloat16 && sizeof(acc_t) == sizeof(float)) {
    half_run_store(reinterpret_cast<const float*>(in), n, static_cast<uint16_t*>(data) + offset);
    return;
  }
  for (int64_t i = 0; i < n; ++i) store_element<acc_t>(data, dtype, offset + i * stride, in[i]);
}

}  // namespace
}  // namespace diffdoctor
