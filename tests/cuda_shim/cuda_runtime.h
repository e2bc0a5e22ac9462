// The CUDA built-ins that csrc/cuda uses, for a host C++ compiler: the kernels of the library run on the CPU, one
// block after another, with every thread of a block alive at once (engine.h). Found before the toolkit's header of the
// same name when tests/cuda_shim stands first on the include path.
//
// What this proves: indices, bounds, barriers, shuffles, reductions, arithmetic. What it cannot: memory order between
// blocks, speed, and the rounding of device intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// Blocks run one at a time, so one static object per kernel instance is that block's shared memory.
#define __shared__ static

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = void*;

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

struct cudaLaunchAttribute {
  int id;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_shim {

// What a test may look at or set; one launch is one kernel.
struct Record {
  long long launches = 0;
  long long blocks = 0;
  cudaStream_t stream = nullptr;
  int fail_next = 0;  // a cudaError_t that the next launch returns instead of running
};
inline Record record;

}  // namespace cuda_shim

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim;
  const dim3 block = config->blockDim;
  if (cuda_shim::record.fail_next != 0) {
    const auto error = static_cast<cudaError_t>(cuda_shim::record.fail_next);
    cuda_shim::record.fail_next = 0;
    return error;
  }
  const bool grid_fits =
      grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535u && grid.z >= 1 && grid.z <= 65535u;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid_fits || threads < 1 || threads > 1024 || config->dynamicSmemBytes != 0) {
    return cudaErrorInvalidConfiguration;
  }
  cuda_shim::record.launches += 1;
  cuda_shim::record.blocks += static_cast<long long>(grid.x) * grid.y * grid.z;
  cuda_shim::record.stream = config->stream;
  cuda_shim::run_grid(grid, block, [&]() { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaFuncAttributes {};

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Parameters...)) {
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

// ---- synchronisation ------------------------------------------------------------------------------------------------

inline void __syncthreads() { cuda_shim::block_barrier(); }

inline int __syncthreads_or(int predicate) { return cuda_shim::any_in_block(predicate); }

// TSan does not model stand-alone fences; the block counter's atomics carry the order there.
inline void __threadfence() {
#ifndef __SANITIZE_THREAD__
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  unsigned old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
  unsigned next;
  do {
    next = old >= limit ? 0u : old + 1u;
  } while (!__atomic_compare_exchange_n(address, &old, next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}

// ---- warp exchange --------------------------------------------------------------------------------------------------

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned base = cuda_shim::lane_index() & ~(static_cast<unsigned>(width) - 1u);
  return cuda_shim::exchange(mask, value, base + static_cast<unsigned>(lane) % static_cast<unsigned>(width));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned lane = cuda_shim::lane_index();
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  const bool inside = source / static_cast<unsigned>(width) <= lane / static_cast<unsigned>(width);
  return cuda_shim::exchange(mask, value, inside ? source : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = cuda_shim::lane_index();
  const bool inside = lane % static_cast<unsigned>(width) + delta < static_cast<unsigned>(width);
  return cuda_shim::exchange(mask, value, inside ? lane + delta : lane);
}

// ---- loads, stores, arithmetic --------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
