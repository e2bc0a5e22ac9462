// Loads and stores of every element type as float or double, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/platform.h"
#include "common/types.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace diffdoctor {

DD_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

DD_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DD_HD float bfloat16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

DD_HD uint16_t float_to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
#endif
}

DD_HD float float16_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals exactly.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
  const uint32_t special = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  return bits_to_float(sign | (magnitude >= 0x7c00u ? special : float_to_bits(scaled)));
#endif
}

DD_HD uint16_t float_to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the addition of 0.5 rounds to the subnormal spacing 2^-24; the mantissa's low bits are the answer.
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(sign | half);
#endif
}

// level / 255, correctly rounded for every level, whether a compiler fuses the sum or not: 1 / 255 in two parts, the
// first of so few bits that a level times it is exact. A division takes several times as long.
DD_HD float level_of_byte(uint32_t level) {
  const float x = static_cast<float>(level);
  return x * (257.0f / 65536.0f) + x * static_cast<float>(1.0 / 255.0 - 257.0 / 65536.0);
}

// acc_t is float or double. uint8 is a level of 0..255, bool is any non-zero byte.
template <typename acc_t>
DD_HD acc_t load_element(const void* data, int32_t dtype, int64_t index) {
  switch (dtype) {
    case kFloat32:
      return static_cast<acc_t>(static_cast<const float*>(data)[index]);
    case kBFloat16:
      return static_cast<acc_t>(bfloat16_to_float(static_cast<const uint16_t*>(data)[index]));
    case kFloat16:
      return static_cast<acc_t>(float16_to_float(static_cast<const uint16_t*>(data)[index]));
    case kFloat64:
      return static_cast<acc_t>(static_cast<const double*>(data)[index]);
    case kUInt8:
      if (sizeof(acc_t) == sizeof(float)) return level_of_byte(static_cast<const uint8_t*>(data)[index]);
      return static_cast<acc_t>(static_cast<const uint8_t*>(data)[index]) / static_cast<acc_t>(255);
    default:
      return static_cast<const uint8_t*>(data)[index] != 0 ? static_cast<acc_t>(1) : static_cast<acc_t>(0);
  }
}

template <typename acc_t>
DD_HD void store_element(void* data, int32_t dtype, int64_t index, acc_t value) {
  switch (dtype) {
    case kFloat32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case kBFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_bfloat16(static_cast<float>(value));
      break;
    case kFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_float16(static_cast<float>(value));
      break;
    default:
      static_cast<double*>(data)[index] = static_cast<double>(value);
  }
}

template <typename acc_t>
DD_HD acc_t load_per_sample(const PerSample& values, int64_t b) {
  return values.data ? static_cast<const acc_t*>(values.data)[b * values.stride] : static_cast<acc_t>(values.value);
}

}  // namespace diffdoctor
