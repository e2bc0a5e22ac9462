// The mean of the spatial weight omega over a sample or the batch: one pass over the maps, before weighted_loss
// divides.
#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/spatial.cuh"
#include "cuda/tiling.h"
#include "cuda/weighted_loss.h"

namespace diffdoctor::cuda {
namespace {

constexpr int64_t kPositionsPerBlock = 4 * kThreads;

struct Positions {
  int64_t count;  // of a sample
  int64_t free, inner;
  int64_t blocks_per_sample;
  int32_t narrow;
};

Positions positions_of(const WeightedLossParams& p) {
  const Tiling t = make_tiling(p, false);
  const int64_t count = t.outer * t.inner;
  return {count, t.free, t.inner, ceil_div(count, kPositionsPerBlock), t.narrow};
}

template <typename acc_t>
__global__ void __launch_bounds__(kThreads, 2)
    weight_mean_kernel(const __grid_constant__ WeightedLossParams p, const __grid_constant__ Positions t, acc_t* out,
                       bool per_sample, void* workspace) {
  const int64_t b = blockIdx.x / t.blocks_per_sample;
  const int64_t begin = (blockIdx.x - b * t.blocks_per_sample) * kPositionsPerBlock;
  acc_t sum[1] = {0};
  for (int k = threadIdx.x; k < kPositionsPerBlock && begin + k < t.count; k += kThreads) {
    const int64_t s = begin + k;
    const int64_t o = s / t.inner;
    sum[0] += position_of<acc_t, false>(p, t.narrow != 0, b, o * t.free * t.inner + (s - o * t.inner)).omega;
  }
  acc_t* partials = workspace_body<acc_t>(workspace, p.batch);
  store_block_sums<1>(sum, partials, 1, 0, blockIdx.x);
  const double divisor = static_cast<double>(t.count);
  const auto emit = [&](int64_t sample, const double (&sums)[1]) {
    const double mean = sums[0] / divisor;
    if (per_sample) out[sample] = static_cast<acc_t>(mean);
    return mean;
  };
  double total;
  if (!reduce_samples<1>(workspace, partials, 1, p.batch, b, t.blocks_per_sample, total, emit) || per_sample) return;
  out[0] = static_cast<acc_t>(total / static_cast<double>(p.batch));
}

template <typename acc_t>
const char* launch_for(const WeightedLossParams& p, void* out, bool per_sample, void* workspace, void* stream) {
  const Positions t = positions_of(p);
  return launch<weight_mean_kernel<acc_t>>(p.batch * t.blocks_per_sample, stream, p, t, static_cast<acc_t*>(out),
                                           per_sample, workspace);
}

}  // namespace

int64_t weight_mean_workspace(const WeightedLossParams& p) {
  return workspace_bytes(p.batch, p.batch * positions_of(p).blocks_per_sample, p.dtype == kFloat64 ? 8 : 4);
}

const char* launch_weight_mean(const WeightedLossParams& p, void* out, bool per_sample, void* workspace, void* stream) {
  return p.dtype == kFloat64 ? launch_for<double>(p, out, per_sample, workspace, stream)
                             : launch_for<float>(p, out, per_sample, workspace, stream);
}

}  // namespace diffdoctor::cuda
