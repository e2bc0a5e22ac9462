// Where policy_lanes.cu finds the pixels of a sample, and what maps say of them. Host code but for Steps::at.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/policy_loss_params.h"
#include "cuda/tiling.h"
#include "cuda/vector.cuh"

namespace diffdoctor::cuda::policy {

// Steps along a map, in elements: a group is row * columns + column, its pixels lie in two halves.
struct Steps {
  int32_t row, column, half, lane, pixel;

  __device__ __forceinline__ int32_t at(int32_t r, int32_t c, int share) const {
    return r * row + c * column + share / 2 * half + share % 2 * lane;
  }
};

// A number for each pixel.
struct Pixels {
  const void* data;      // null: there is none
  int64_t batch_stride;  // in bytes
  int32_t dtype;
  Steps steps;
};

// How a sample's elements are cut: as latents, where the pixels of a channel lie side by side, or as tokens.
struct Layout {
  bool tokens;
  int32_t pixels;               // of a vector
  int32_t row_dim, column_dim;  // of the groups; row_dim is -1 where all are of one row
  int64_t groups, columns;
};

inline int64_t product(const WeightedLossParams& p, int begin, int end) {
  int64_t all = 1;
  for (int d = begin; d < end; ++d) all *= p.size[d];
  return all;
}

// The dims of [begin, end) that are no dims of size 1: at most two of them, else false.
inline bool two_dims(const WeightedLossParams& p, int begin, int end, int32_t& row, int32_t& column) {
  row = column = -1;
  for (int d = begin; d < end; ++d) {
    if (p.size[d] == 1) continue;
    if (row != -1) return false;
    row = column;
    column = d;
  }
  if (column == -1) column = end - 1;
  return true;
}

inline bool find_layout(const PolicyLossParams& p, Layout& t) {
  const WeightedLossParams& g = p.grid;
  const int width = vector_width(g.dtype), c = p.channel_dim;
  const int64_t outer = product(g, 0, c), inner = product(g, c + 1, kMaxDims);
  t.tokens = outer != 1;
  t.pixels = t.tokens ? 4 : width;
  const int64_t pixels = outer * inner;
  if (p.channels() == 1 || pixels >= (int64_t{1} << 31)) return false;
  if (t.tokens) {
    int32_t half, lane;
    if (inner != 4 || p.channels() * inner % width != 0 || !two_dims(g, c + 1, kMaxDims, half, lane)) return false;
    if (!two_dims(g, 0, c, t.row_dim, t.column_dim)) return false;
    t.columns = g.size[t.column_dim];
  } else {
    if (!two_dims(g, c + 1, kMaxDims, t.row_dim, t.column_dim) || g.size[t.column_dim] % width != 0) return false;
    t.columns = g.size[t.column_dim] / width;
  }
  t.groups = pixels / t.pixels;
  return true;
}

// A map's steps, false where they are too large or the map has another size than the grid.
inline bool find_steps(const PolicyLossParams& p, const Layout& t, const int64_t (&stride)[kMaxDims], Steps& steps) {
  const WeightedLossParams& g = p.grid;
  const int64_t row = t.row_dim == -1 ? 0 : stride[t.row_dim], column = stride[t.column_dim];
  int64_t found[5] = {row, column, 0, 0, 0};
  if (t.tokens) {
    int32_t half, lane;
    two_dims(g, p.channel_dim + 1, kMaxDims, half, lane);
    found[3] = stride[lane];
    found[2] = half == -1 ? 2 * stride[lane] : stride[half];
  } else {
    const int own = t.pixels / 4;
    found[1] = column * t.pixels;
    found[2] = column * 2 * own;
    found[3] = column * own;
    found[4] = column;
  }
  int64_t most = 0;
  for (const int64_t step : {found[1] * t.columns, found[0] * (t.groups / t.columns), 2 * found[2], 2 * found[3]})
    most += step < 0 ? -step : step;
  steps = {static_cast<int32_t>(found[0]), static_cast<int32_t>(found[1]), static_cast<int32_t>(found[2]),
           static_cast<int32_t>(found[3]), static_cast<int32_t>(found[4])};
  return most < (int64_t{1} << 31);
}

inline bool find_pixels(const PolicyLossParams& p, const Layout& t, const Map& map, Pixels& pixels) {
  pixels = {nullptr, 0, kFloat32, {}};
  if (map.mode == kAbsent) return true;
  pixels = {map.data, map.batch_stride * dtype_bytes(map.dtype), map.dtype, {}};
  return map.mode == kSame && map.dtype != kFloat64 && find_steps(p, t, map.stride, pixels.steps);
}

}  // namespace diffdoctor::cuda::policy
