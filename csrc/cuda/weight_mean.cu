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

// The end of the kernels, from a thread's sum in a block of sample b: the mean over `count` positions of each sample.
template <typename acc_t>
__device__ __forceinline__ void finish(int64_t count, int64_t batch, int64_t b, int64_t blocks_per_sample,
                                       int64_t block, acc_t sum, acc_t* out, bool per_sample, void* workspace) {
  acc_t* partials = workspace_body<acc_t>(workspace, batch);
  const acc_t values[1] = {sum};
  store_block_sums<1>(values, partials, 1, 0, b * blocks_per_sample + block);
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
  const int64_t b = blockIdx.x / t.blocks_per_sample, block = blockIdx.x - b * t.blocks_per_sample;
  const int64_t begin = block * kPositionsPerBlock;
  acc_t sum[1] = {0};
  for (int k = threadIdx.x; k < kPositionsPerBlock && begin + k < t.count; k += kThreads) {
    const int64_t s = begin + k;
    const int64_t o = t.narrow ? static_cast<uint32_t>(s) / static_cast<uint32_t>(t.inner) : s / t.inner;
    sum[0] += position_of<acc_t, false>(p, t.narrow != 0, b, o * t.free * t.inner + (s - o * t.inner)).omega;
  }
  finish(t.count, p.batch, b, t.blocks_per_sample, block, sum[0], out, per_sample, workspace);
}

// Maps at the grid's size whose positions stand side by side in memory, in fp32 arithmetic. A thread takes 4 or 16
// positions, N of which stand side by side; all are loaded before the first is used.
struct Rows {
  Map confidence, mask;
  Line<float> weights;
  float threshold;
  int64_t batch, count;  // positions of a sample
  int64_t blocks_per_sample;
  int32_t positions;  // of a thread
};

constexpr int kFewPositions = 4, kManyPositions = 16;

// The positions of a thread's visits, from the index'th element of a map on.
template <int N, int kVisits>
__device__ __forceinline__ void load_visits(const Map& map, int64_t index, int32_t visits,
                                            Raw<float, N> (&raw)[kVisits]) {
  const auto load = [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    const char* first = static_cast<const char*>(map.data) + index * kBytes;
#pragma unroll
    for (int v = 0; v < kVisits; ++v) {
      if (v >= visits) break;
      load_bytes<N * kBytes, true>(first + v * kThreads * N * kBytes, raw[v].word);
    }
  };
  if (map.dtype == kFloat32) {
    load(std::integral_constant<int, 4>());
  } else if (map.dtype == kUInt8 || map.dtype == kBool) {
    load(std::integral_constant<int, 1>());
  } else {
    load(std::integral_constant<int, 2>());
  }
}

template <int N>
__device__ __forceinline__ void unpack_map(const Map& map, const Raw<float, N>& raw, float (&value)[N]) {
  if (map.dtype == kUInt8 || map.dtype == kBool) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const uint32_t byte = raw.word[0] >> (8 * j) & 0xffu;
      value[j] = map.dtype == kUInt8 ? level_of_byte(byte) : byte != 0 ? 1.0f : 0.0f;
    }
  } else if (map.dtype == kFloat32) {
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = bits_to_float(raw.word[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto bits = static_cast<uint16_t>(raw.word[j / 2] >> (j % 2 * 16));
      value[j] = map.dtype == kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
    }
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads, 4)
    weight_rows_kernel(const __grid_constant__ Rows p, float* out, bool per_sample, void* workspace) {
  constexpr int kVisits = kManyPositions / N;
  const unsigned b = blockIdx.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.positions * kThreads + threadIdx.x * N;
  const int64_t left = p.count - first;
  const bool whole = left > (p.positions - N) * kThreads;
  const int32_t visits = whole ? p.positions / N : (static_cast<int32_t>(left) + N * kThreads - 1) / (N * kThreads);
  const bool has_confidence = p.confidence.mode != kAbsent, has_mask = p.mask.mode != kAbsent;
  Raw<float, N> confidence[kVisits], mask[kVisits];
  if (has_confidence) load_visits(p.confidence, b * p.confidence.batch_stride + first, visits, confidence);
  if (has_mask) load_visits(p.mask, b * p.mask.batch_stride + first, visits, mask);
  float sum = 0;
#pragma unroll
  for (int v = 0; v < kVisits; ++v) {
    if (v >= visits) break;
    float omega[N] = {}, k[N];
    if (has_confidence) unpack_map<N>(p.confidence, confidence[v], omega);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float u = omega[j] >= p.threshold ? fminf(omega[j], 1.0f) : 0.0f;
      omega[j] = at_level(p.weights, u);
    }
    if (has_mask) {
      unpack_map<N>(p.mask, mask[v], k);
#pragma unroll
      for (int j = 0; j < N; ++j) omega[j] *= region(k[j]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sum += omega[j];
  }
  finish(p.count, p.batch, b, p.blocks_per_sample, blockIdx.x, sum, out, per_sample, workspace);
}

bool is_row(const Map& map) {
  return map.mode == kAbsent || (map.mode == kSame && map.dtype != kFloat64 && map.stride[kMaxDims - 1] == 1);
}

bool has_rows(const WeightedLossParams& p) {
  const Tiling t = make_tiling(p, false);
  return p.dtype != kFloat64 && p.batch <= kMostRows && p.gamma == 1 && t.spatial && t.outer == 1 &&
         t.inner == p.size[kMaxDims - 1] && is_row(p.confidence) && is_row(p.mask);
}

// Whether four positions can be loaded at once, everywhere.
bool has_fours(const WeightedLossParams& p) {
  const auto aligned = [&](const Map& map) { return map.mode == kAbsent || is_aligned(map, p.batch, 4); };
  return p.size[kMaxDims - 1] % 4 == 0 && aligned(p.confidence) && aligned(p.mask);
}

Rows rows_of(const WeightedLossParams& p) {
  const int64_t count = p.size[kMaxDims - 1];
  const bool many = p.batch * count >= blocks_for_visits * kManyPositions * kThreads;
  const int32_t positions = many ? kManyPositions : kFewPositions;
  return {p.confidence,
          p.mask,
          spatial_weight<float>(p),
          static_cast<float>(p.threshold),
          p.batch,
          count,
          ceil_div(count, positions * kThreads),
          positions};
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
    auto* to = static_cast<float*>(out);
    return has_fours(p)
               ? launch_rows<weight_rows_kernel<4>>(q.blocks_per_sample, p.batch, stream, q, to, per_sample, workspace)
               : launch_rows<weight_rows_kernel<1>>(q.blocks_per_sample, p.batch, stream, q, to, per_sample, workspace);
  }
  return p.dtype == kFloat64 ? launch_for<double>(p, out, per_sample, workspace, stream)
                             : launch_for<float>(p, out, per_sample, workspace, stream);
}

}  // namespace diffdoctor::cuda
