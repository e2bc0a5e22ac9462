#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace diffdoctor::cuda {

__device__ __forceinline__ int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
__device__ __forceinline__ int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

}  // namespace diffdoctor::cuda
