// N consecutive elements of a dtype known at run time, loaded and stored 16 bytes at a time where N elements fill them.
// Loading and converting are two steps, so that a thread can have several loads under way.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/types.h"

namespace diffdoctor::cuda {

// The bits of N elements, at most as wide as acc_t each.
template <typename acc_t, int N>
struct Raw {
  uint32_t word[N * sizeof(acc_t) < 8 ? 2 : N * sizeof(acc_t) / 4];
};

DD_HD double words_to_double(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// kReadOnly: nothing writes near `source` while the kernel runs, so that the read may go through the read-only cache;
// else it goes to the second level, and stays one access where the compiler could split a plain one.
template <bool kReadOnly, typename word_t>
__device__ __forceinline__ word_t load_word(const void* source, int at = 0) {
  const word_t* address = static_cast<const word_t*>(source) + at;
  return kReadOnly ? __ldg(address) : __ldcg(address);
}

template <int kBytes, bool kReadOnly>
__device__ __forceinline__ void load_bytes(const void* source, uint32_t* word) {
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int k = 0; k < kBytes / 16; ++k) {
      const uint4 four = load_word<kReadOnly, uint4>(source, k);
      word[4 * k] = four.x;
      word[4 * k + 1] = four.y;
      word[4 * k + 2] = four.z;
      word[4 * k + 3] = four.w;
    }
  } else if constexpr (kBytes == 8) {
    const uint2 two = load_word<kReadOnly, uint2>(source);
    word[0] = two.x;
    word[1] = two.y;
  } else if constexpr (kBytes == 4) {
    word[0] = load_word<kReadOnly, uint32_t>(source);
  } else if constexpr (kBytes == 2) {
    word[0] = load_word<kReadOnly, uint16_t>(source);
  } else {
    word[0] = load_word<kReadOnly, uint8_t>(source);
  }
}

// Keep the compiler from working out a number or an address anew wherever it is used.
__device__ __forceinline__ void keep_in_register([[maybe_unused]] int32_t& number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
}

template <typename T>
__device__ __forceinline__ void keep_in_register([[maybe_unused]] T*& address) {
#if defined(__CUDA_ARCH__)
  size_t number = __cvta_generic_to_global(address);
  asm volatile("" : "+l"(number));
  address = static_cast<T*>(__cvta_global_to_generic(number));
#endif
}

template <typename T>
__device__ __forceinline__ void keep_shared_in_register([[maybe_unused]] T*& address) {
#if defined(__CUDA_ARCH__)
  auto number = static_cast<uint32_t>(__cvta_generic_to_shared(address));
  asm volatile("" : "+r"(number));
  address = static_cast<T*>(__cvta_shared_to_generic(number));
#endif
}

template <int kBytes>
__device__ __forceinline__ void store_bytes(void* target, const uint32_t* word) {
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int k = 0; k < kBytes / 16; ++k) {
      static_cast<uint4*>(target)[k] = uint4{word[4 * k], word[4 * k + 1], word[4 * k + 2], word[4 * k + 3]};
    }
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(target) = uint2{word[0], word[1]};
  } else if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(target) = word[0];
  } else {
    *static_cast<uint16_t*>(target) = static_cast<uint16_t>(word[0]);
  }
}

template <typename T>
__device__ __forceinline__ const void* element_address(const void* data, int64_t index) {
  return static_cast<const T*>(data) + index;
}

template <typename acc_t, int N, bool kReadOnly = true>
__device__ __forceinline__ Raw<acc_t, N> load_raw(const void* data, int32_t dtype, int64_t index) {
  Raw<acc_t, N> raw;
  if (dtype == kFloat32) {
    load_bytes<4 * N, kReadOnly>(element_address<float>(data, index), raw.word);
  } else if (dtype != kFloat64) {
    load_bytes<2 * N, kReadOnly>(element_address<uint16_t>(data, index), raw.word);
  } else if constexpr (sizeof(acc_t) == 8) {
    load_bytes<8 * N, kReadOnly>(element_address<double>(data, index), raw.word);
  } else {  // a double beside a narrower prediction: rounded to acc_t here, unpacked as float
    uint32_t wide[2 * N];
    load_bytes<8 * N, kReadOnly>(element_address<double>(data, index), wide);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      raw.word[j] = float_to_bits(static_cast<float>(words_to_double(wide[2 * j], wide[2 * j + 1])));
    }
  }
  return raw;
}

// Elements [first, first + N) of `raw`; first is a compile-time constant once the caller's loop is unrolled.
template <typename acc_t, int N, int kWidth>
__device__ __forceinline__ void unpack(const Raw<acc_t, kWidth>& raw, int first, int32_t dtype, acc_t (&value)[N]) {
  const uint32_t* word = raw.word;
  if (dtype == kBFloat16) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const uint32_t pair = word[(first + j) / 2];
      value[j] = bits_to_float((first + j) % 2 ? pair & 0xffff0000u : pair << 16);
    }
  } else if (dtype == kFloat16) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      value[j] = float16_to_float(static_cast<uint16_t>(word[(first + j) / 2] >> ((first + j) % 2 * 16)));
    }
  } else if (sizeof(acc_t) == 4 || dtype == kFloat32) {
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = bits_to_float(word[first + j]);
  } else if constexpr (sizeof(acc_t) == 8) {
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = words_to_double(word[2 * (first + j)], word[2 * (first + j) + 1]);
  }
}

// Two rounded elements in a word, by one instruction: compilers for compute capability 10 make two and a third of them.
template <int32_t kDtype>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (kDtype == kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  }
  return word;
#else
  if constexpr (kDtype == kBFloat16)
    return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
  return float_to_float16(low) | static_cast<uint32_t>(float_to_float16(high)) << 16;
#endif
}

// kWidth rounded elements on their way to memory.
template <int32_t kDtype, int kWidth>
struct Packed {
  static constexpr int kBytes = kWidth * (kDtype == kFloat64 ? 8 : kDtype == kFloat32 ? 4 : 2);
  uint32_t word[kBytes < 4 ? 1 : kBytes / 4];
};

template <int32_t kDtype, typename acc_t, int N, int kWidth>
__device__ __forceinline__ void pack(const acc_t (&value)[N], int first, Packed<kDtype, kWidth>& packed) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int at = first + j;
    if constexpr (kDtype == kFloat32) {
      packed.word[at] = float_to_bits(value[j]);
    } else if constexpr (kDtype == kFloat64) {
      uint64_t bits;
      memcpy(&bits, &value[j], sizeof(bits));
      packed.word[2 * at] = static_cast<uint32_t>(bits);
      packed.word[2 * at + 1] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (N % 2 == 0) {
      if (j % 2 == 0)
        packed.word[at / 2] = round_pair<kDtype>(static_cast<float>(value[j]), static_cast<float>(value[j + 1]));
    } else {
      const float narrow = static_cast<float>(value[j]);
      const uint32_t bits = kDtype == kBFloat16 ? float_to_bfloat16(narrow) : float_to_float16(narrow);
      packed.word[at / 2] = at % 2 ? packed.word[at / 2] | bits << 16 : bits;
    }
  }
}

template <int32_t kDtype, int kWidth>
__device__ __forceinline__ void store_packed(void* data, int64_t index, const Packed<kDtype, kWidth>& packed) {
  constexpr int kBytes = Packed<kDtype, kWidth>::kBytes;
  store_bytes<kBytes>(static_cast<char*>(data) + index * (kBytes / kWidth), packed.word);
}

// N consecutive values from shared memory, at a multiple of N from a 16-byte boundary.
template <typename acc_t, int N>
__device__ __forceinline__ void load_shared(const acc_t* source, acc_t (&value)[N]) {
  if constexpr (N == 1) {
    value[0] = source[0];
  } else {
#pragma unroll
    for (int k = 0; k < N * static_cast<int>(sizeof(acc_t)) / 16; ++k) {
      const uint4 four = reinterpret_cast<const uint4*>(source)[k];
      memcpy(&value[k * 16 / sizeof(acc_t)], &four, sizeof(four));
    }
  }
}

DD_HD int64_t dtype_bytes(int32_t dtype) {
  switch (dtype) {
    case kFloat64:
      return 8;
    case kFloat32:
      return 4;
    case kBFloat16:
    case kFloat16:
      return 2;
    default:
      return 1;
  }
}

// Whether N elements from the address of `x` on, in every sample, can be loaded 16 bytes at a time, or at once where
// they are fewer.
template <typename tensor_t>
bool is_aligned(const tensor_t& x, int64_t batch, int N) {
  const int64_t bytes = N * dtype_bytes(x.dtype);
  return reinterpret_cast<uintptr_t>(x.data) % (bytes < 16 ? bytes : 16) == 0 &&
         (batch == 1 || x.batch_stride % N == 0);
}

}  // namespace diffdoctor::cuda
