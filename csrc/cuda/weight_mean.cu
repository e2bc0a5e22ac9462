// The mean of the spatial weight omega over a sample or the batch: one pass over the maps, before weighted_loss
// divides.
#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/spatial.cuh"
#include "cuda/tiling.h"
#include "cuda/vector.cuh"
#include "cuda/weighted_loss.h"

namespace diffdoctor::cuda {

// A thread takes more positions of maps in rows once there are so many blocks: four waves of four blocks on each of 132
// multiprocessors.
extern int64_t blocks_for_visits;
int64_t blocks_for_visits = 2112;  // the tests lower it, to have such threads on small maps

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

// The end of both kernels, from a thread's sum: the mean over `count` positions of each sample.
template <typename acc_t>
__device__ __forceinline__ void finish(int64_t count, int64_t batch, int64_t b, int64_t blocks_per_sample, acc_t sum,
                                       acc_t* out, bool per_sample, void* workspace) {
  acc_t* partials = workspace_body<acc_t>(workspace, batch);
  const acc_t values[1] = {sum};
  store_block_sums<1>(values, partials, 1, 0, blockIdx.x);
  const double divisor = static_cast<double>(count);
  const auto emit = [&](int64_t sample, const double (&sums)[1]) {
    const double mean = sums[0] / divisor;
    if (per_sample) out[sample] = static_cast<acc_t>(mean);
    return mean;
  };
  double total;
  if (!reduce_samples<1>(workspace, partials, 1, batch, b, blocks_per_sample, total, emit) || per_sample) return;
  out[0] = static_cast<acc_t>(total / static_cast<double>(batch));
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
  finish(t.count, p.batch, b, t.blocks_per_sample, sum[0], out, per_sample, workspace);
}

// Maps at the grid's size whose positions stand side by side in memory, in fp32 arithmetic. A thread takes four
// positions at a time, `visits` times; all are loaded before the first is used.
struct Rows {
  Map confidence, mask;
  Line<float> weights;
  float threshold;
  int64_t batch, count;  // positions of a sample
  int64_t blocks_per_sample;
  int32_t visits;
};

constexpr int kMostVisits = 4;

__device__ __forceinline__ void load_four(const Map& map, int64_t b, int64_t at, Raw<float, 4>& raw) {
  const int64_t index = b * map.batch_stride + at;
  if (map.dtype == kUInt8 || map.dtype == kBool) {
    load_bytes<4, true>(static_cast<const uint8_t*>(map.data) + index, raw.word);
  } else {
    raw = load_raw<float, 4>(map.data, map.dtype, index);
  }
}

__device__ __forceinline__ void unpack_four(const Map& map, const Raw<float, 4>& raw, float (&value)[4]) {
  if (map.dtype == kUInt8 || map.dtype == kBool) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t byte = raw.word[0] >> (8 * j) & 0xffu;
      value[j] = map.dtype == kUInt8 ? level_of_byte(byte) : byte != 0 ? 1.0f : 0.0f;
    }
  } else {
    unpack<float, 4>(raw, 0, map.dtype, value);
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    weight_rows_kernel(const __grid_constant__ Rows p, float* out, bool per_sample, void* workspace) {
  const int64_t b = blockIdx.x / p.blocks_per_sample;
  const int64_t first = (blockIdx.x - b * p.blocks_per_sample) * p.visits * kThreads * 4 + threadIdx.x * 4;
  const bool has_confidence = p.confidence.mode != kAbsent, has_mask = p.mask.mode != kAbsent;
  Raw<float, 4> confidence[kMostVisits], mask[kMostVisits];
#pragma unroll
  for (int v = 0; v < kMostVisits; ++v) {
    const int64_t at = first + v * kThreads * 4;
    if (v >= p.visits || at >= p.count) break;
    if (has_confidence) load_four(p.confidence, b, at, confidence[v]);
    if (has_mask) load_four(p.mask, b, at, mask[v]);
  }
  float sum = 0;
#pragma unroll
  for (int v = 0; v < kMostVisits; ++v) {
    if (v >= p.visits || first + v * kThreads * 4 >= p.count) break;
    float c[4] = {0, 0, 0, 0}, k[4] = {1, 1, 1, 1};
    if (has_confidence) unpack_four(p.confidence, confidence[v], c);
    if (has_mask) unpack_four(p.mask, mask[v], k);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float u = c[j] >= p.threshold ? fminf(c[j], 1.0f) : 0.0f;
      sum += region(k[j]) * at_level(p.weights, u);
    }
  }
  finish(p.count, p.batch, b, p.blocks_per_sample, sum, out, per_sample, workspace);
}

bool is_row_of_fours(const Map& map, int64_t batch) {
  if (map.mode == kAbsent) return true;
  return map.mode == kSame && map.dtype != kFloat64 && map.stride[kMaxDims - 1] == 1 && is_aligned(map, batch, 4);
}

bool has_rows(const WeightedLossParams& p) {
  const Tiling t = make_tiling(p, false);
  return p.dtype != kFloat64 && p.gamma == 1 && t.spatial && t.outer == 1 && t.inner == p.size[kMaxDims - 1] &&
         t.inner % 4 == 0 && is_row_of_fours(p.confidence, p.batch) && is_row_of_fours(p.mask, p.batch);
}

Rows rows_of(const WeightedLossParams& p) {
  const int64_t count = p.size[kMaxDims - 1];
  const int32_t visits = p.batch * count >= blocks_for_visits * kMostVisits * kThreads * 4 ? kMostVisits : 1;
  return {p.confidence,
          p.mask,
          spatial_weight<float>(p),
          static_cast<float>(p.threshold),
          p.batch,
          count,
          ceil_div(count, visits * kThreads * 4),
          visits};
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
  if (has_rows(p)) {
    const Rows q = rows_of(p);
    return launch<weight_rows_kernel>(p.batch * q.blocks_per_sample, stream, q, static_cast<float*>(out), per_sample,
                                      workspace);
  }
  return p.dtype == kFloat64 ? launch_for<double>(p, out, per_sample, workspace, stream)
                             : launch_for<float>(p, out, per_sample, workspace, stream);
}

}  // namespace diffdoctor::cuda
