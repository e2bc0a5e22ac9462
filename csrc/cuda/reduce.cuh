// Sums over a grid in one launch, in a fixed order: threads of a block, blocks of a sample, samples. The last block of
// a sample adds up what its others left, and the last of those adds up the samples. Blocks [b * per_sample, (b + 1) *
// per_sample) belong to sample b, so that no partial sum straddles samples.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/platform.h"
#include "cuda/launch.cuh"

namespace diffdoctor::cuda {

constexpr int kCounters = 1023;  // of blocks; where there are more samples, several share one

// The head of a workspace, zero between launches. A double for each sample and the partial sums follow it.
struct alignas(16) WorkspaceHead {
  unsigned counted;  // counters that have run full
  unsigned blocks_done[kCounters];
};

inline int64_t workspace_bytes(int64_t batch, int64_t numbers, int64_t bytes) {
  return static_cast<int64_t>(sizeof(WorkspaceHead)) + batch * 8 + numbers * bytes;
}

__device__ __forceinline__ double* workspace_shares(void* workspace) {
  return reinterpret_cast<double*>(static_cast<char*>(workspace) + sizeof(WorkspaceHead));
}

template <typename T>
__device__ __forceinline__ T* workspace_body(void* workspace, int64_t batch) {
  return reinterpret_cast<T*>(workspace_shares(workspace) + batch);
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Adds each value over the block, the block'th of the grid, and stores the sums of the first `columns - first` of them
// at partials[block * columns + first ...].
template <int kValues, typename acc_t>
__device__ __forceinline__ void store_block_sums(const acc_t (&values)[kValues], acc_t* partials, int columns,
                                                 int first, int64_t block) {
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
    partials[block * columns + first + c] = sum;
  }
}

// True in every thread of the last of `expected` blocks to come here, which then sees what the others stored before.
// The barrier puts a block's stores before its one fence; the counter wraps to zero by itself.
__device__ __forceinline__ bool arrives_last(unsigned* counter, unsigned expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, expected - 1) == expected - 1;
    if (last) __threadfence();
  }
  __syncthreads();
  return last;
}

// What a sample counts with: itself, or where there are very many, its neighbours too.
struct Counter {
  int64_t begin, end;  // samples
  unsigned index, counters;

  __device__ __forceinline__ Counter(int64_t batch, int64_t b) {
    const int64_t each = batch <= kCounters ? 1 : (batch + kCounters - 1) / kCounters;
    index = static_cast<unsigned>(each == 1 ? b : b / each);
    counters = static_cast<unsigned>(each == 1 ? batch : (batch + each - 1) / each);
    begin = index * each;
    end = begin + each < batch ? begin + each : batch;
  }
};

// The sum over a block, in thread 0.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T shared[kWarps];
  value = warp_sum(value);
  __syncthreads();  // an earlier sum has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) sum += shared[w];
  return sum;
}

// The sum of what the samples left in the workspace, once all have: true in thread 0 of the block that comes last.
__device__ __forceinline__ bool sum_shares(void* workspace, const Counter& counter, int64_t batch, double& total) {
  const double* shares = workspace_shares(workspace);
  if (batch == 1) {
    total = threadIdx.x == 0 ? shares[0] : 0;
    return threadIdx.x == 0;
  }
  if (!arrives_last(&static_cast<WorkspaceHead*>(workspace)->counted, counter.counters)) return false;
  double sum = 0;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) sum += __ldcg(shares + b);
  total = block_sum(sum);
  return threadIdx.x == 0;
}

// To be called by every block of sample b once it has stored its partial sums. Where it is the last: adds up `columns`
// of them and hands them to emit(sample, sums) in one thread, which returns the sample's share of `total`. True in
// thread 0 of the block that comes last of all, where `total` is the sum of the shares.
template <int kColumns, typename acc_t, typename Emit>
__device__ __forceinline__ bool reduce_samples(void* workspace, const acc_t* partials, int columns, int64_t batch,
                                               int64_t b, int64_t per_sample, double& total, Emit emit) {
  const Counter counter(batch, b);
  unsigned* done = &static_cast<WorkspaceHead*>(workspace)->blocks_done[counter.index];
  if (!arrives_last(done, static_cast<unsigned>((counter.end - counter.begin) * per_sample))) return false;
  __shared__ double sums[kColumns];  // thread 0's; in registers the loop below would have to be written out
  for (int64_t sample = counter.begin; sample < counter.end; ++sample) {
#pragma unroll 1
    for (int c = 0; c < columns; ++c) {
      const acc_t* column = partials + sample * per_sample * columns + c;
      double sum = 0;
      for (int64_t k = threadIdx.x; k < per_sample; k += kThreads) {
        sum += static_cast<double>(__ldcg(column + k * columns));
      }
      sum = block_sum(sum);
      if (threadIdx.x == 0) sums[c] = sum;
    }
    if (threadIdx.x == 0) workspace_shares(workspace)[sample] = emit(sample, sums);
  }
  return sum_shares(workspace, counter, batch, total);
}

}  // namespace diffdoctor::cuda
