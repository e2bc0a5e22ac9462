// What maps and weighting say about one position of a sample.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/weighted_loss.h"
#include "cuda/tiling.h"

namespace diffdoctor::cuda {

// Decodes element i of a sample over the iteration dims, innermost first: visit(d, i_d).
template <typename index_t, typename Visit>
__device__ __forceinline__ void decode(const WeightedLossParams& p, index_t i, Visit visit) {
#pragma unroll
  for (int d = kMaxDims - 1; d >= 0; --d) {
    const int outermost = kMaxDims - p.ndim;
    if (d < outermost) break;
    const index_t size = static_cast<index_t>(p.size[d]);
    const index_t rest = d == outermost ? 0 : i / size;
    visit(d, static_cast<int64_t>(i - rest * size));
    i = rest;
  }
}

template <typename Visit>
__device__ __forceinline__ void decode(const WeightedLossParams& p, bool narrow, int64_t i, Visit visit) {
  if (narrow) {
    decode(p, static_cast<uint32_t>(i), visit);
  } else {
    decode(p, static_cast<uint64_t>(i), visit);
  }
}

template <typename acc_t>
struct Position {
  acc_t u;          // artifact level
  acc_t omega;      // spatial weight, mask included
  acc_t m;          // gradient modulation
  acc_t weighting;  // element-wise v
  bool nan;         // confidence or mask is NaN
  bool outside;     // confidence or mask is outside [0, 1]
};

template <typename acc_t>
__device__ __forceinline__ acc_t map_value(const WeightedLossParams& p, const Map& map, int64_t b, int64_t offset,
                                           const int64_t (&at)[3], acc_t absent) {
  if (map.mode == kAbsent) return absent;
  if (map.mode == kSame) return load_element<acc_t>(map.data, map.dtype, b * map.batch_stride + offset);
  return resampled_value<acc_t>(map, p.grid, b, at[0], at[1], at[2]);
}

// i: any element of the position.
template <typename acc_t, bool kWithWeighting = true>
__device__ __forceinline__ Position<acc_t> position_of(const WeightedLossParams& p, bool narrow, int64_t b, int64_t i) {
  int64_t confidence = 0, mask = 0, weighting = 0;
  int64_t at[3] = {0, 0, 0};
  decode(p, narrow, i, [&](int d, int64_t index) {
    confidence += index * p.confidence.stride[d];
    mask += index * p.mask.stride[d];
    if (kWithWeighting) weighting += index * p.weighting.stride[d];
    at[0] += index * p.coord[0][d];
    at[1] += index * p.coord[1][d];
    at[2] += index * p.coord[2][d];
  });
  Position<acc_t> position;
  const acc_t c = map_value<acc_t>(p, p.confidence, b, confidence, at, 0);
  const acc_t k = map_value<acc_t>(p, p.mask, b, mask, at, 1);
  position.nan = c != c || k != k;
  position.outside = is_outside(c) || is_outside(k);
  position.u = artifact_level(p, c);
  position.omega = region(k) * at_level(spatial_weight<acc_t>(p), position.u);
  position.m = at_level(gradient_weight<acc_t>(p), position.u);
  position.weighting = 1;
  if (kWithWeighting && p.weighting.present) {
    position.weighting =
        load_element<acc_t>(p.weighting.data, p.weighting.dtype, b * p.weighting.batch_stride + weighting);
  }
  return position;
}

// What holds at every position when there is no map and no weighting.
template <typename acc_t>
__device__ __forceinline__ Position<acc_t> position_without_maps(const WeightedLossParams& p) {
  Position<acc_t> position;
  position.nan = position.outside = false;
  position.u = artifact_level(p, acc_t(0));
  position.omega = at_level(spatial_weight<acc_t>(p), position.u);
  position.m = at_level(gradient_weight<acc_t>(p), position.u);
  position.weighting = 1;
  return position;
}

// A piece of the sample.
struct Tile {
  int64_t first;  // element index of its first position at f = 0
  int32_t positions;
  int32_t free_begin, free_end;

  __device__ __forceinline__ Tile(const Tiling& t, int64_t index) {
    free_begin = 0;
    free_end = static_cast<int32_t>(t.free);
    if (t.outers_per_tile != 0) {
      const int64_t o = index * t.outers_per_tile;
      first = o * t.free * t.inner;
      positions = static_cast<int32_t>(min64(t.outers_per_tile, t.outer - o) * t.inner);
      return;
    }
    const int64_t piece = index / t.groups;
    const int64_t group = index - piece * t.groups;
    const int64_t pieces = (t.inner + t.positions - 1) / t.positions;
    const int64_t o = piece / pieces;
    const int64_t q = (piece - o * pieces) * t.positions;
    first = o * t.free * t.inner + q;
    positions = static_cast<int32_t>(min64(t.positions, t.inner - q));
    free_begin = static_cast<int32_t>(group * t.free_per_group);
    free_end = static_cast<int32_t>(min64(free_begin + t.free_per_group, t.free));
  }

  // Element index of the s'th position at f = 0.
  __device__ __forceinline__ int64_t element(const Tiling& t, int s) const {
    if (t.outers_per_tile == 0) return first + s;
    const int inner = static_cast<int>(t.inner);
    const int o = s / inner;
    return first + o * t.free * t.inner + (s - o * inner);
  }

 private:
  static __device__ __forceinline__ int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
};

}  // namespace diffdoctor::cuda
