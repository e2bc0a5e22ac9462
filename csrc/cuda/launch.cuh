// Launching a kernel without <<<>>>, so that the same file compiles as host C++ for the tests.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace diffdoctor::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, void* stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return "the grid would need more than 2^31 - 1 blocks";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // else the next, unrelated check would report this error again
  return cudaGetErrorString(error);
}

}  // namespace diffdoctor::cuda
