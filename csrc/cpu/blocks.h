// Blocks of a sample's iteration space, gathered into and scattered from buffers that stay in the first-level cache.
#pragma once

#include "common/resample.h"
#include "common/weighted_loss.h"
#include "cpu/convert.h"

namespace diffdoctor {
namespace {

constexpr int64_t kChunk = 2048;  // a page of bf16: the hardware prefetcher starts anew at each

// How a sample is cut: a block is a range of dim `split` with all dims inside it, at most kChunk elements.
struct Tiling {
  int split;
  int64_t inner;   // elements inside one step of dim `split`
  int64_t range;   // steps of dim `split` in a block
  int64_t ranges;  // blocks along dim `split`
  // Dims outside `split`: those along which the maps change, and the free ones, over which a block's maps are reused.
  int map_dims[kMaxDims], map_count;
  int free_dims[kMaxDims], free_count;
  int64_t map_steps, free_steps;
  int64_t groups;  // the free steps are cut into this many work items
  int64_t items;   // per sample: map_steps * ranges * groups
};

inline bool map_moves(const Map& map, const WeightedLossParams& p, int d) {
  if (map.mode == kAbsent) return false;
  if (map.mode == kSame) return map.stride[d] != 0;
  return p.coord[0][d] != 0 || p.coord[1][d] != 0 || p.coord[2][d] != 0;
}

inline Tiling make_tiling(const WeightedLossParams& p) {
  Tiling t;
  t.inner = 1;
  t.split = kMaxDims - 1;
  while (t.split > 0 && t.inner * p.size[t.split] <= kChunk) t.inner *= p.size[t.split--];
  // Where a map is resampled, it should be once for a position: no blocks along a dim it does not know, and smaller
  // blocks rather than free steps on several threads.
  const bool resampled = p.confidence.mode > kSame || p.mask.mode > kSame;
  if (resampled && t.split < kMaxDims - 1 && !map_moves(p.confidence, p, t.split) && !map_moves(p.mask, p, t.split))
    t.inner /= p.size[++t.split];
  const int64_t size = p.size[t.split];
  int64_t most = kChunk / t.inner;
  if (resampled && p.batch * p.count < 64 * kChunk * 16) most = most / 4;
  most = most < 1 ? 1 : most;
  t.ranges = (size + most - 1) / most;
  t.range = (size + t.ranges - 1) / t.ranges;
  t.ranges = (size + t.range - 1) / t.range;
  t.map_count = t.free_count = 0;
  t.map_steps = t.free_steps = 1;
  for (int d = 0; d < t.split; ++d) {
    if (p.size[d] == 1) continue;
    if (map_moves(p.confidence, p, d) || map_moves(p.mask, p, d)) {
      t.map_dims[t.map_count++] = d;
      t.map_steps *= p.size[d];
    } else {
      t.free_dims[t.free_count++] = d;
      t.free_steps *= p.size[d];
    }
  }
  // Enough work items for many threads; the number must not depend on how many there are.
  const int64_t whole = p.batch * t.map_steps * t.ranges, enough = resampled ? 8 : 64;
  t.groups = whole >= enough ? 1 : (enough + whole - 1) / whole;
  t.groups = t.groups < t.free_steps ? t.groups : t.free_steps;
  t.items = t.map_steps * t.ranges * t.groups;
  return t;
}

// A block's place: indices of the dims outside, and the range [lo, lo + steps) of dim `split`.
struct Place {
  int64_t b;
  int64_t index[kMaxDims];
  int64_t lo, steps, count;
};

inline void set_index(const WeightedLossParams& p, const int* dims, int count, int64_t step, int64_t* index) {
  for (int k = count - 1; k >= 0; --k) {
    index[dims[k]] = step % p.size[dims[k]];
    step /= p.size[dims[k]];
  }
}

inline int64_t block_offset(const Tiling& t, const Place& at, int64_t batch_stride, const int64_t* stride) {
  int64_t offset = at.b * batch_stride + at.lo * stride[t.split];
  for (int d = 0; d < t.split; ++d) offset += at.index[d] * stride[d];
  return offset;
}

// Whether a block of this operand is one run of memory.
inline bool block_is_run(const WeightedLossParams& p, const Tiling& t, const int64_t* stride) {
  int64_t dense = 1;
  for (int d = kMaxDims - 1; d >= t.split; --d) {
    if (p.size[d] != 1 && stride[d] != dense) return false;
    dense *= p.size[d];
  }
  return true;
}

inline int64_t block_steps(const WeightedLossParams& p, const Tiling& t, const Place& at, int d) {
  return d == t.split ? at.steps : p.size[d];
}

// Fills out[] over dims d.. of a block; returns how many elements that was. A dim with stride 0 is copied, not read.
template <typename acc_t>
int64_t gather(const WeightedLossParams& p, const Tiling& t, const Place& at, const void* data, int32_t dtype,
               const int64_t* stride, int64_t offset, int d, acc_t* out) {
  const int64_t steps = block_steps(p, t, at, d);
  if (d == kMaxDims - 1) {
    load_run<acc_t>(data, dtype, offset, stride[d], steps, out);
    return steps;
  }
  const int64_t inner = gather(p, t, at, data, dtype, stride, offset, d + 1, out);
  for (int64_t i = 1; i < steps; ++i) {
    if (stride[d] == 0)
      memcpy(out + i * inner, out, inner * sizeof(acc_t));
    else
      gather(p, t, at, data, dtype, stride, offset + i * stride[d], d + 1, out + i * inner);
  }
  return inner * steps;
}

template <typename acc_t>
int64_t scatter(const WeightedLossParams& p, const Tiling& t, const Place& at, void* data, int32_t dtype,
                const int64_t* stride, int64_t offset, int d, const acc_t* in) {
  const int64_t steps = block_steps(p, t, at, d);
  if (d == kMaxDims - 1) {
    store_run<acc_t>(data, dtype, offset, stride[d], steps, in);
    return steps;
  }
  int64_t done = 0;
  for (int64_t i = 0; i < steps; ++i)
    done += scatter(p, t, at, data, dtype, stride, offset + i * stride[d], d + 1, in + done);
  return done;
}

// Area averages of n neighbours along x with the element type known: every window in row-major order like resample.h's.
template <typename acc_t, typename map_t, typename load_t>
void area_run(const Map& map, const int64_t* grid, int64_t b, const int64_t* at, int64_t n, acc_t* out, load_t load) {
  const int64_t t0 = area_begin(at[0], map.in_size[0], grid[0]), t1 = area_end(at[0], map.in_size[0], grid[0]);
  const int64_t y0 = area_begin(at[1], map.in_size[1], grid[1]), y1 = area_end(at[1], map.in_size[1], grid[1]);
  const int64_t step = map.in_stride[2];
  int64_t begin[kChunk];
  int32_t width[kChunk];
  for (int64_t i = 0; i < n; ++i) {
    begin[i] = area_begin(at[2] + i, map.in_size[2], grid[2]);
    width[i] = static_cast<int32_t>(area_end(at[2] + i, map.in_size[2], grid[2]) - begin[i]);
    out[i] = 0;
  }
  for (int64_t j = t0; j < t1; ++j)
    for (int64_t k = y0; k < y1; ++k) {
      const map_t* row =
          static_cast<const map_t*>(map.data) + b * map.batch_stride + j * map.in_stride[0] + k * map.in_stride[1];
      for (int64_t i = 0; i < n; ++i) {
        const map_t* from = row + begin[i] * step;
        acc_t sum = out[i];
        for (int32_t x = 0; x < width[i]; ++x) sum += load(from[x * step]);
        out[i] = sum;
      }
    }
  const acc_t frames = static_cast<acc_t>(t1 - t0), rows = static_cast<acc_t>(y1 - y0);
  for (int64_t i = 0; i < n; ++i) out[i] = out[i] / frames / rows / static_cast<acc_t>(width[i]);
}

template <typename acc_t>
void area_run(const Map& map, const int64_t* grid, int64_t b, const int64_t* at, int64_t n, acc_t* out) {
  switch (map.dtype) {
    case kFloat32:
      return area_run<acc_t, float>(map, grid, b, at, n, out, [](float v) { return acc_t(v); });
    case kBFloat16:
      return area_run<acc_t, uint16_t>(map, grid, b, at, n, out,
                                       [](uint16_t v) { return acc_t(bfloat16_to_float(v)); });
    case kFloat16:
      return area_run<acc_t, uint16_t>(map, grid, b, at, n, out, [](uint16_t v) { return acc_t(half_to_float(v)); });
    case kFloat64:
      return area_run<acc_t, double>(map, grid, b, at, n, out, [](double v) { return acc_t(v); });
    case kUInt8: {
      acc_t levels[256];  // a division for each level instead of one for each pixel
      for (int k = 0; k < 256; ++k) levels[k] = acc_t(k) / acc_t(255);
      return area_run<acc_t, uint8_t>(map, grid, b, at, n, out, [&levels](uint8_t v) { return levels[v]; });
    }
    default:
      return area_run<acc_t, uint8_t>(map, grid, b, at, n, out, [](uint8_t v) { return acc_t(v != 0); });
  }
}

// n grid positions along the innermost dim, whose coordinates advance by `step`.
template <typename acc_t>
void resampled_run(const Map& map, const int64_t* grid, int64_t b, const int64_t* at, const int64_t* step, int64_t n,
                   acc_t* out) {
  if (map.mode == kArea && n >= 8 && step[0] == 0 && step[1] == 0 && step[2] == 1) {
    area_run(map, grid, b, at, n, out);
    return;
  }
  for (int64_t i = 0; i < n; ++i)
    out[i] = resampled_value<acc_t>(map, grid, b, at[0] + i * step[0], at[1] + i * step[1], at[2] + i * step[2]);
}

// Like gather, for a map that is resampled. coord: grid position of the block's corner.
template <typename acc_t>
int64_t gather_resampled(const WeightedLossParams& p, const Tiling& t, const Place& at, const Map& map,
                         const int64_t* coord, int d, acc_t* out) {
  const int64_t steps = block_steps(p, t, at, d);
  const int64_t step[3] = {p.coord[0][d], p.coord[1][d], p.coord[2][d]};
  const bool fixed = step[0] == 0 && step[1] == 0 && step[2] == 0;
  if (d == kMaxDims - 1) {
    resampled_run(map, p.grid, at.b, coord, step, fixed ? 1 : steps, out);
    for (int64_t i = 1; fixed && i < steps; ++i) out[i] = out[0];
    return steps;
  }
  int64_t inner = 1;
  int64_t c[3] = {coord[0], coord[1], coord[2]};
  for (int64_t i = 0; i < steps; ++i) {
    if (i > 0 && fixed)
      memcpy(out + i * inner, out, inner * sizeof(acc_t));
    else
      inner = gather_resampled(p, t, at, map, c, d + 1, out + i * inner);
    for (int axis = 0; axis < 3; ++axis) c[axis] += step[axis];
  }
  return inner * steps;
}

// A map over a block, at the grid's resolution.
template <typename acc_t>
void gather_map(const WeightedLossParams& p, const Tiling& t, const Place& at, const Map& map, acc_t* out) {
  if (map.mode == kSame) {
    const int64_t offset = block_offset(t, at, map.batch_stride, map.stride);
    if (block_is_run(p, t, map.stride))
      load_run<acc_t>(map.data, map.dtype, offset, 1, at.count, out);
    else
      gather(p, t, at, map.data, map.dtype, map.stride, offset, t.split, out);
    return;
  }
  int64_t coord[3];
  for (int axis = 0; axis < 3; ++axis) {
    coord[axis] = at.lo * p.coord[axis][t.split];
    for (int d = 0; d < t.split; ++d) coord[axis] += at.index[d] * p.coord[axis][d];
  }
  gather_resampled(p, t, at, map, coord, t.split, out);
}

}  // namespace
}  // namespace diffdoctor
