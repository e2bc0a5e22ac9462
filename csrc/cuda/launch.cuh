// Launching a kernel without <<<>>>, so that the same file compiles as host C++ for the tests.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/types.h"

namespace diffdoctor::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// What makes the driver load a kernel, for each that is launched anywhere: device_problem() calls them all.
using Loader = cudaError_t (*)();
inline std::vector<Loader>& loaders() {
  static std::vector<Loader> all;
  return all;
}

template <auto kKernel>
struct Loaded {
  static cudaError_t load() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, kKernel);
  }
  static inline const bool listed = (loaders().push_back(&load), true);
};

constexpr int64_t kMostRows = 65535;  // of blocks

template <auto kKernel, typename... Arguments>
const char* launch_rows(int64_t blocks, int64_t rows, void* stream, const Arguments&... arguments) {
  static_cast<void>(Loaded<kKernel>::listed);
  if (blocks > INT32_MAX) return "the grid would need more than 2^31 - 1 blocks";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rows));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kKernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // else the next, unrelated check would report this error again
  return cudaGetErrorString(error);
}

template <auto kKernel, typename... Arguments>
const char* launch(int64_t blocks, void* stream, const Arguments&... arguments) {
  return launch_rows<kKernel>(blocks, 1, stream, arguments...);
}

// body(the dtype as a constant), for what is compiled once for each dtype of a prediction.
template <typename body_t>
const char* for_dtype(int32_t dtype, const body_t& body) {
  switch (dtype) {
    case kFloat32:
      return body(std::integral_constant<int32_t, kFloat32>{});
    case kBFloat16:
      return body(std::integral_constant<int32_t, kBFloat16>{});
    case kFloat16:
      return body(std::integral_constant<int32_t, kFloat16>{});
    default:
      return body(std::integral_constant<int32_t, kFloat64>{});
  }
}

}  // namespace diffdoctor::cuda
