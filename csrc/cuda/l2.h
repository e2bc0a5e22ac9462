// weighted_loss for nearly every training call: l2 alone, model_pred and terms dense, maps at the grid's size, no sums.
// Everything that is the same for a launch is worked out on the host. Where a run of positions is no whole number of
// vectors, or does not start at one, l2_odd.cu serves a call with maps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/weighted_loss_params.h"
#include "cuda/tiling.h"

namespace diffdoctor::cuda {

// How vectors of model_pred (16 bytes) are dealt out. A block has 256 >> column_bits rows of columns; a column is a
// vector of positions, whose factors its thread keeps in registers while it goes over every rows'th of the f's.
struct L2Tiling {
  int32_t vectors;      // of a run, one f's positions; the last is not full where l2_odd.cu serves it
  int32_t column_bits;  // log2 of the columns of a block
  int32_t steps;        // columns that a thread visits one after another
  int32_t frees, frees_per_group, groups;
  int32_t tiles;  // of a sample; a block works on one
};

// A thread takes several vectors where that leaves so many tiles for each of them: 2380 tiles of 14 are six waves of
// three blocks an SM.
inline int64_t tiles_per_vector = 170;  // the tests lower it, to have large tiles of small tensors

// The most columns of a block of l2_odd.cu: their factors stand in 48 KB of shared memory.
constexpr int odd_column_bits(int width, bool levels) { return levels && width == 8 ? 7 : 8; }

constexpr int64_t kMostOdd = int64_t{1} << 30;  // elements of a sample for l2_odd.cu, which counts them in 32 bits

// even: every run starts at a vector.
inline L2Tiling l2_tiling(const WeightedLossParams& p, bool even) {
  const Tiling whole = make_tiling(p, true);
  const int64_t width = vector_width(p.dtype), frees = whole.free;
  const int64_t vectors = whole.spatial ? ceil_div(whole.inner, width) : whole.inner / width;
  L2Tiling t{};
  t.vectors = static_cast<int32_t>(vectors);
  t.frees = static_cast<int32_t>(frees);
  t.column_bits = even ? 8 : odd_column_bits(static_cast<int>(width), p.spatial_coefs != 0);
  // Fewer columns where the last of a run would stay empty, as long as a warp reads one piece and rows have f's.
  const auto columns = [&] { return int64_t{1} << t.column_bits; };
  const auto wasted = [&] { return 20 * (ceil_div(vectors, columns()) * columns() - vectors) > vectors; };
  while (t.column_bits > 5 && wasted() && (512 >> t.column_bits) <= frees) --t.column_bits;
  const int64_t visits = ceil_div(frees, 256 >> t.column_bits);  // of f's, by a thread with all of them
  for (const int64_t each : {14, 6, 3, 2, 1}) {                  // vectors of a thread
    t.groups = static_cast<int32_t>(ceil_div(visits, each));
    t.steps = static_cast<int32_t>(std::max<int64_t>(1, (each + visits / 2) / visits));
    t.frees_per_group = static_cast<int32_t>(ceil_div(visits, t.groups) * (256 >> t.column_bits));
    t.groups = static_cast<int32_t>(ceil_div(frees, t.frees_per_group));
    t.tiles = static_cast<int32_t>(ceil_div(vectors, columns() * t.steps) * t.groups);
    if (t.tiles * p.batch >= tiles_per_vector * each) break;
  }
  return t;
}

// Whether launch_l2 serves a plan, whatever the addresses.
bool l2_serves(const WeightedLossParams& p);

// Whether it serves the call.
bool l2_serves_call(const WeightedLossParams& p);

// The tiles of a sample that it takes at most.
int64_t l2_tiles(const WeightedLossParams& p);

const char* launch_l2(const WeightedLossParams& p, void* workspace, void* stream);

// Of a call with maps that launch_l2 serves.
const char* launch_l2_odd(const WeightedLossParams& p, void* workspace, void* stream);

}  // namespace diffdoctor::cuda
