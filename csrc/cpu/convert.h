// Runs of elements to and from the accumulation type. Included by files built for different instruction sets:
// everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "cpu/compiler.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace diffdoctor {
namespace {

// Storage types beside float and double. float16 has conversions by the run: half_run, half_run_store.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct level8 {  // 0..255 stands for [0, 1]
  uint8_t value;
};
struct truth8 {
  uint8_t value;
};

inline float half_to_float(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#elif defined(__aarch64__)
  __fp16 half;
  memcpy(&half, &bits, sizeof(half));
  return half;
#else
  return float16_to_float(bits);
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__aarch64__)
  const __fp16 half = static_cast<__fp16>(value);
  uint16_t bits;
  memcpy(&bits, &half, sizeof(bits));
  return bits;
#else
  return float_to_float16(value);
#endif
}

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(bfloat16 x) { return bfloat16_to_float(x.bits); }
inline float to_acc(float16 x) { return half_to_float(x.bits); }

template <typename acc_t, typename storage_t>
acc_t as(storage_t x) {
  return static_cast<acc_t>(to_acc(x));
}
// level / 255 as the division rounds it, for all 256 levels: 257 * level / 2^16 is exact, and so is nearly all of the
// rest.
template <>
inline float as<float, level8>(level8 x) {
  const float low = static_cast<float>(x.value) * (256.0f / 255.0f / 16777216.0f);
  return static_cast<float>(x.value * 257) * (1.0f / 65536.0f) + low;
}
template <>
inline double as<double, level8>(level8 x) {
  return static_cast<double>(x.value) / 255.0;
}
template <>
inline float as<float, truth8>(truth8 x) {
  return x.value != 0 ? 1.0f : 0.0f;
}
template <>
inline double as<double, truth8>(truth8 x) {
  return x.value != 0 ? 1.0 : 0.0;
}

inline void from_acc(float value, float* out) { *out = value; }
inline void from_acc(double value, double* out) { *out = value; }
inline void from_acc(float value, bfloat16* out) { out->bits = float_to_bfloat16(value); }
inline void from_acc(float value, float16* out) { out->bits = float_to_half(value); }

// The same for what is not NaN.
inline void from_number(float value, float* out) { *out = value; }
inline void from_number(double value, double* out) { *out = value; }
inline void from_number(float value, bfloat16* out) {
  const uint32_t bits = float_to_bits(value);
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void half_run(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = half_to_float(in[i]);
}

inline void half_run_store(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) out[i] = float_to_half(in[i]);
}

// The accumulation type's own code.
template <typename acc_t>
constexpr int32_t kAccDtype = sizeof(acc_t) == sizeof(double) ? kFloat64 : kFloat32;

inline int64_t element_size(int32_t dtype) {
  if (dtype == kFloat64) return 8;
  if (dtype == kFloat32) return 4;
  return dtype == kUInt8 || dtype == kBool ? 1 : 2;
}

inline const void* address(const void* data, int32_t dtype, int64_t offset) {
  return static_cast<const char*>(data) + offset * element_size(dtype);
}

// body(pointer to the storage type) for data of any dtype.
template <typename body_t>
void with_storage(const void* data, int32_t dtype, const body_t& body) {
  switch (dtype) {
    case kFloat32:
      return body(static_cast<const float*>(data));
    case kBFloat16:
      return body(static_cast<const bfloat16*>(data));
    case kFloat16:
      return body(static_cast<const float16*>(data));
    case kFloat64:
      return body(static_cast<const double*>(data));
    case kUInt8:
      return body(static_cast<const level8*>(data));
    default:
      return body(static_cast<const truth8*>(data));
  }
}

// n elements from data[offset], `stride` apart, as acc_t.
template <typename acc_t>
void load_run(const void* data, int32_t dtype, int64_t offset, int64_t stride, int64_t n, acc_t* out) {
  if (stride == 0) {
    const acc_t value = load_element<acc_t>(data, dtype, offset);
    for (int64_t i = 0; i < n; ++i) out[i] = value;
    return;
  }
  if (stride == 1 && dtype == kFloat16 && sizeof(acc_t) == sizeof(float)) {
    half_run(static_cast<const uint16_t*>(data) + offset, n, reinterpret_cast<float*>(out));
    return;
  }
  with_storage(address(data, dtype, offset), dtype, [=](auto in) {
    using storage_t = std::remove_cv_t<std::remove_pointer_t<decltype(in)>>;
    if (stride == 1)
      for (int64_t i = 0; i < n; ++i) out[i] = as<acc_t, storage_t>(in[i]);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = as<acc_t, storage_t>(in[i * stride]);
  });
}

template <typename acc_t>
void store_run(void* data, int32_t dtype, int64_t offset, int64_t stride, int64_t n, const acc_t* in) {
  if (stride == 1 && dtype == kFloat16 && sizeof(acc_t) == sizeof(float)) {
    half_run_store(reinterpret_cast<const float*>(in), n, static_cast<uint16_t*>(data) + offset);
    return;
  }
  if (dtype == kBFloat16) {
    bfloat16* out = static_cast<bfloat16*>(data) + offset;
    for (int64_t i = 0; i < n; ++i) from_acc(static_cast<float>(in[i]), out + i * stride);
    return;
  }
  if (dtype == kAccDtype<acc_t>) {
    acc_t* out = static_cast<acc_t*>(data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i * stride] = in[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) store_element<acc_t>(data, dtype, offset + i * stride, in[i]);
}

}  // namespace
}  // namespace diffdoctor
