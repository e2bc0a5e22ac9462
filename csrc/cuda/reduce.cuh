// Sums over a grid in one launch, in a fixed order: threads of a block, then blocks of a sample. The block that
// finishes last adds up what the others left. Blocks [b * per_sample, (b + 1) * per_sample) belong to sample b, so that
// no partial sum straddles samples.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/platform.h"
#include "cuda/launch.cuh"

namespace diffdoctor::cuda {

// The head of a workspace; the partial sums follow it.
struct alignas(16) WorkspaceHead {
  unsigned blocks_done;
};

template <typename acc_t>
DD_HD acc_t* workspace_body(void* workspace) {
  return reinterpret_cast<acc_t*>(static_cast<char*>(workspace) + sizeof(WorkspaceHead));
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Adds each value over the block and stores the sums of the first `columns - first` of them at
// partials[blockIdx.x * columns + first ...].
template <int kValues, typename acc_t>
__device__ __forceinline__ void store_block_sums(const acc_t (&values)[kValues], acc_t* partials, int columns,
                                                 int first) {
  __shared__ acc_t shared[kValues][kWarps];
#pragma unroll
  for (int c = 0; c < kValues; ++c) {
    if (first + c >= columns) break;
    const acc_t sum = warp_sum(values[c]);
    if (threadIdx.x % 32 == 0) shared[c][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (c < kValues && first + c < columns) {
    acc_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared[c][w];
    partials[static_cast<int64_t>(blockIdx.x) * columns + first + c] = sum;
  }
}

// True in every thread of the block that comes last; what the other blocks stored before is then visible to it. The
// counter wraps to zero by itself.
__device__ __forceinline__ bool is_last_block(void* workspace) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* done = &static_cast<WorkspaceHead*>(workspace)->blocks_done;
    last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// To be called by a whole block. Adds up the partial sums of every sample and hands them to emit(b, sums, total) in one
// thread; emit may add to `total`, and the sum of the totals is returned in thread 0.
template <int kColumns, typename acc_t, typename Emit>
__device__ double reduce_samples(const acc_t* partials, int columns, int64_t batch, int64_t per_sample, Emit emit) {
  __shared__ double shared[kColumns][kWarps];
  __shared__ double totals[kWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // Few samples: all warps share one. Many: a warp each.
  const bool share = batch < kWarps;
  const int64_t lanes = share ? kThreads : 32;
  double total = 0;
  for (int64_t b = share ? 0 : warp; b < batch; b += share ? 1 : kWarps) {
    double sums[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sums[c] = 0;
      if (c >= columns) continue;
      const acc_t* column = partials + b * per_sample * columns + c;
      for (int64_t k = share ? threadIdx.x : lane; k < per_sample; k += lanes) {
        sums[c] += static_cast<double>(__ldcg(column + k * columns));
      }
      sums[c] = warp_sum(sums[c]);
      if (share && lane == 0) shared[c][warp] = sums[c];
    }
    if (share) {
      __syncthreads();
      for (int c = 0; c < kColumns; ++c) {
        sums[c] = 0;
        if (c >= columns) continue;
        for (int w = 0; w < kWarps; ++w) sums[c] += shared[c][w];
      }
      __syncthreads();
    }
    if (share ? threadIdx.x == 0 : lane == 0) emit(b, sums, total);
  }
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += totals[w];
  return sum;
}

}  // namespace diffdoctor::cuda
