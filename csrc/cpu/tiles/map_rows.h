// Maps at the grid's resolution over a block. A map of another size is resampled row by row over the box of grid
// positions that the block covers, each position once, and read from there as any operand is.
#pragma once

#include "common/resample.h"
#include "cpu/tiles/gather.h"

namespace diffdoctor {
namespace {

// Grid positions [low, low + size) along t, y and x.
struct Box {
  int64_t low[3], size[3];
  int64_t positions() const { return size[0] * size[1] * size[2]; }
};

// What a box's columns read of a map's row. area: [first, first + width). bilinear: first and second, `weight` of the
// second. nearest: first.
template <typename acc_t>
struct MapColumns {
  int32_t first[kChunk], second[kChunk];
  acc_t weight[kChunk];
  int32_t factor;  // area: the width where it is the same for all and windows do not overlap, else 0
};

template <typename acc_t>
void fill_columns(const Map& map, const int64_t* grid, const Box& box, MapColumns<acc_t>& columns) {
  const int64_t in = map.in_size[2], out = grid[2], low = box.low[2];
  columns.factor = 0;
  if (map.mode == kArea) {
    if (in % out == 0) columns.factor = static_cast<int32_t>(in / out);
    // low * in = begin * out + rest, carried from column to column: a division for each would cost more than its sum.
    int64_t begin = low * in / out, rest = low * in % out;
    for (int64_t i = 0; i < box.size[2]; ++i) {
      columns.first[i] = static_cast<int32_t>(begin);
      begin += in / out;
      rest += in % out;
      if (rest >= out) {
        rest -= out;
        ++begin;
      }
      columns.second[i] = static_cast<int32_t>(begin + (rest != 0) - columns.first[i]);
    }
    return;
  }
  for (int64_t i = 0; i < box.size[2]; ++i) {
    int64_t first, second = 0;
    if (map.mode == kBilinear)
      bilinear_index(low + i, in, out, first, second, columns.weight[i]);
    else
      first = map.mode == kNearest ? nearest_index(low + i, in, out) : nearest_exact_index(low + i, in, out);
    columns.first[i] = static_cast<int32_t>(first);
    columns.second[i] = static_cast<int32_t>(second);
  }
}

// Adds windows of kFactor neighbours (0: `factor`) to sums[], each in the order of memory.
template <int kFactor, typename acc_t, typename storage_t>
void add_windows(const storage_t* row, int64_t factor, int64_t n, acc_t* sums) {
  constexpr int64_t kStep = 32;  // outputs between prefetches
  const int64_t width = kFactor > 0 ? kFactor : factor;
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const int64_t count = n - begin < kStep ? n - begin : kStep;
    const storage_t* in = row + begin * width;
    acc_t* out = sums + begin;
    const char* ahead = reinterpret_cast<const char*>(in + kStep * width);
    for (int64_t byte = 0; byte < kStep * width * int64_t(sizeof(storage_t)); byte += 64) prefetch(ahead + byte);
    DD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      acc_t sum = out[i];
      for (int64_t k = 0; k < width; ++k) sum += as<acc_t, storage_t>(in[i * width + k]);
      out[i] = sum;
    }
  }
}

template <typename acc_t, typename storage_t>
void add_area_row(const storage_t* row, int64_t step, const MapColumns<acc_t>& columns, int64_t n, acc_t* sums) {
  if (step == 1 && columns.factor > 0) {
    const storage_t* from = row + columns.first[0];
    switch (columns.factor) {
      case 2:
        return add_windows<2>(from, 2, n, sums);
      case 4:
        return add_windows<4>(from, 4, n, sums);
      case 8:
        return add_windows<8>(from, 8, n, sums);
      case 16:
        return add_windows<16>(from, 16, n, sums);
      default:
        return add_windows<0>(from, columns.factor, n, sums);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const storage_t* from = row + columns.first[i] * step;
    acc_t sum = sums[i];
    for (int32_t k = 0; k < columns.second[i]; ++k) sum += as<acc_t, storage_t>(from[k * step]);
    sums[i] = sum;
  }
}

// The window's sum in row-major order, then the divisions, one per axis, as resample.h has it.
template <typename acc_t, typename storage_t>
void area_row(const Map& map, const int64_t* grid, const storage_t* data, int64_t t, int64_t y,
              const MapColumns<acc_t>& columns, int64_t n, acc_t* out) {
  const int64_t t0 = area_begin(t, map.in_size[0], grid[0]), t1 = area_end(t, map.in_size[0], grid[0]);
  const int64_t y0 = area_begin(y, map.in_size[1], grid[1]), y1 = area_end(y, map.in_size[1], grid[1]);
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
  for (int64_t j = t0; j < t1; ++j)
    for (int64_t k = y0; k < y1; ++k)
      add_area_row(data + j * map.in_stride[0] + k * map.in_stride[1], map.in_stride[2], columns, n, out);
  const acc_t frames = static_cast<acc_t>(t1 - t0), rows = static_cast<acc_t>(y1 - y0);
  for (int64_t i = 0; i < n; ++i) out[i] = out[i] / frames / rows / static_cast<acc_t>(columns.second[i]);
}

template <typename acc_t, typename storage_t>
void bilinear_row(const Map& map, const int64_t* grid, const storage_t* data, int64_t t, int64_t y,
                  const MapColumns<acc_t>& columns, int64_t n, acc_t* out) {
  int64_t t0, t1, y0, y1;
  acc_t wt, wy;
  bilinear_index(t, map.in_size[0], grid[0], t0, t1, wt);
  bilinear_index(y, map.in_size[1], grid[1], y0, y1, wy);
  const int64_t step = map.in_stride[2];
  const auto between = [&](int64_t frame, int64_t i) {
    const storage_t* top = data + frame * map.in_stride[0] + y0 * map.in_stride[1];
    const storage_t* bottom = data + frame * map.in_stride[0] + y1 * map.in_stride[1];
    const int64_t a = columns.first[i] * step, b = columns.second[i] * step;
    const acc_t wx = columns.weight[i];
    const acc_t upper = (1 - wx) * as<acc_t, storage_t>(top[a]) + wx * as<acc_t, storage_t>(top[b]);
    const acc_t lower = (1 - wx) * as<acc_t, storage_t>(bottom[a]) + wx * as<acc_t, storage_t>(bottom[b]);
    return (1 - wy) * upper + wy * lower;
  };
  if (t0 == t1 || wt == 0)
    for (int64_t i = 0; i < n; ++i) out[i] = between(t0, i);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = (1 - wt) * between(t0, i) + wt * between(t1, i);
}

template <typename acc_t, typename storage_t>
void nearest_row(const Map& map, const int64_t* grid, const storage_t* data, int64_t t, int64_t y,
                 const MapColumns<acc_t>& columns, int64_t n, acc_t* out) {
  const auto index = [&](int64_t i, int64_t in, int64_t out) {
    return map.mode == kNearest ? nearest_index(i, in, out) : nearest_exact_index(i, in, out);
  };
  const storage_t* row = data + index(t, map.in_size[0], grid[0]) * map.in_stride[0] +
                         index(y, map.in_size[1], grid[1]) * map.in_stride[1];
  for (int64_t i = 0; i < n; ++i) out[i] = as<acc_t, storage_t>(row[columns.first[i] * map.in_stride[2]]);
}

// The map of sample b over a box, (t, y, x) dense.
template <typename acc_t>
void resample_box(const Map& map, const int64_t* grid, int64_t b, const Box& box, MapColumns<acc_t>& columns,
                  acc_t* out) {
  fill_columns(map, grid, box, columns);
  const int64_t n = box.size[2];
  with_storage(address(map.data, map.dtype, b * map.batch_stride), map.dtype, [&](auto data) {
    for (int64_t i = 0; i < box.size[0]; ++i)
      for (int64_t j = 0; j < box.size[1]; ++j) {
        const int64_t t = box.low[0] + i, y = box.low[1] + j;
        acc_t* row = out + (i * box.size[1] + j) * n;
        if (map.mode == kArea)
          area_row(map, grid, data, t, y, columns, n, row);
        else if (map.mode == kBilinear)
          bilinear_row(map, grid, data, t, y, columns, n, row);
        else
          nearest_row(map, grid, data, t, y, columns, n, row);
      }
  });
}

// Position by position, for a block whose box is too large for a buffer. coord: grid position of the block's corner.
template <typename acc_t>
int64_t gather_positions(const WeightedLossParams& p, const Tiling& t, const Block& at, const Map& map,
                         const int64_t* coord, int d, acc_t* out) {
  const int64_t steps = block_steps(p, t, at, d);
  int64_t done = 0;
  int64_t c[3] = {coord[0], coord[1], coord[2]};
  for (int64_t i = 0; i < steps; ++i) {
    if (d == kMaxDims - 1)
      out[done++] = resampled_value<acc_t>(map, p.grid, at.b, c[0], c[1], c[2]);
    else
      done += gather_positions(p, t, at, map, c, d + 1, out + done);
    for (int axis = 0; axis < 3; ++axis) c[axis] += p.coord[axis][d];
  }
  return done;
}

// What resampling needs beside the block itself.
template <typename acc_t>
struct alignas(64) MapScratch {
  acc_t box[kChunk];
  MapColumns<acc_t> columns;
};

template <typename acc_t>
void gather_resampled(const WeightedLossParams& p, const Tiling& t, const Block& at, const Map& map,
                      MapScratch<acc_t>& scratch, acc_t* out) {
  Box box;
  for (int axis = 0; axis < 3; ++axis) {
    box.low[axis] = at.lo * p.coord[axis][t.split];
    for (int d = 0; d < t.split; ++d) box.low[axis] += at.index[d] * p.coord[axis][d];
    box.size[axis] = 1;
    for (int d = t.split; d < kMaxDims; ++d) box.size[axis] += (block_steps(p, t, at, d) - 1) * p.coord[axis][d];
  }
  if (box.positions() > kChunk || map.in_size[2] > INT32_MAX) {
    gather_positions(p, t, at, map, box.low, t.split, out);
    return;
  }
  const int64_t box_stride[3] = {box.size[1] * box.size[2], box.size[2], 1};
  int64_t stride[kMaxDims];
  int64_t dense = 1;
  bool same_order = true;
  for (int d = kMaxDims - 1; d >= t.split; --d) {
    stride[d] = 0;
    for (int axis = 0; axis < 3; ++axis) stride[d] += p.coord[axis][d] * box_stride[axis];
    const int64_t steps = block_steps(p, t, at, d);
    same_order = same_order && (steps == 1 || stride[d] == dense);
    dense *= steps;
  }
  if (same_order) {
    resample_box(map, p.grid, at.b, box, scratch.columns, out);
    return;
  }
  resample_box(map, p.grid, at.b, box, scratch.columns, scratch.box);
  gather(p, t, at, scratch.box, kAccDtype<acc_t>, stride, 0, out);
}

template <typename acc_t>
void gather_map(const WeightedLossParams& p, const Tiling& t, const Block& at, const Map& map,
                MapScratch<acc_t>& scratch, acc_t* out) {
  if (map.mode != kSame) {
    gather_resampled(p, t, at, map, scratch, out);
    return;
  }
  const int64_t offset = block_offset(t, at, map.batch_stride, map.stride);
  if (block_is_run(p, t, map.stride))
    load_run<acc_t>(map.data, map.dtype, offset, 1, at.count, out);
  else
    gather(p, t, at, map.data, map.dtype, map.stride, offset, out);
}

}  // namespace
}  // namespace diffdoctor
